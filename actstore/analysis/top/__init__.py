"""Rows that were found, with their text, as tables and as pages."""

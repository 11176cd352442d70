"""Connections of clients are let in here, kept within bounds, and written to."""

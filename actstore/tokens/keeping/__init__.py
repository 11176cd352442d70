"""Columns of the source that are kept beside the tokens, one row for each document."""

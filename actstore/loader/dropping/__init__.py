"""Dropping leaves rows out of batches, and counts and finds the rows that remain."""

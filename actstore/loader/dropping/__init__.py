"""Dropping leaves rows out of batches, and counts and finds those that remain."""

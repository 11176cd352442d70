"""Sums of rows and of products of rows of one or several hooks, in passes over a store."""

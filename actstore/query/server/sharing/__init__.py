"""Sharing does work once for all clients that ask for the same."""

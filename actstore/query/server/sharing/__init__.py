"""Sharing does work once for all clients who ask for the same."""

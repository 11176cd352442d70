"""Capture shows the values that pass the hooks of a model, and changes them on the way."""

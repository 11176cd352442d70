"""The store: its bytes, its commits, and reading them. It knows nothing of models or of text."""

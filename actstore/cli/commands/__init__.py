"""Commands that make, move, check and serve stores, one file a command."""

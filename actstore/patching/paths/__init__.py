"""Path patching: what reaches one part of a model directly from another."""

"""Layers of a model over rows that lie packed side by side, without padding and without their prefixes."""

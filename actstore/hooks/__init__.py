"""Hooks: names as TransformerLens users know them, on unmodified Hugging Face models."""

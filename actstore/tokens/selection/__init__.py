"""Choosing the positions of sequences whose activations are stored."""

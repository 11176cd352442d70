"""Activations of prompts, read from a store that is filled as they are asked for."""

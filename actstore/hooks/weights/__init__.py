"""Weights of a model are given under the names and in the shapes of TransformerLens."""

"""Families say where each kind of model keeps its parts, and which hooks and sizes it has.

To add a family, add it to the table in `architectures`.
"""

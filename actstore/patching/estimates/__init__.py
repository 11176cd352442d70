"""Estimates of patching to first order: of all cells, or all edges, in two forwards and one backward pass."""

"""Geometry of rows: their principal components, means, norms and nearest rows, and how hooks map to each other.

What needs products of rows with rows rests on one reduction, `moments`, whose sums are float64.
"""

"""Estimates of patching to first order: of all cells, or all edges, in two forwards and one backward pass.

To add a way to estimate cells, add it to ``Method`` in `attribution`, with its rules for gradients in a file like
`relevance_rules`. Other scores have a file of their own, such as `edge_scores`; `runs` has the two runs that all share.
"""

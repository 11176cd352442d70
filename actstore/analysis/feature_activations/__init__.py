"""How often and how strongly features are active, and examples of where, in one pass over a store.

Nobody knows the largest activation before the pass has ended, so intervals of values are powers of two, see `binning`:
they grow with what is seen, and the result has the same bits in any order of units.
"""

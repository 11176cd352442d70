"""Training on the rows of a store: shuffled batches, in an order that is computed rather than kept.

Modules import torch in the functions that use it, since the server loads them and needs torch for batches alone.
"""

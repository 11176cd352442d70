"""Analysis reads whole stores: it finds matching sequences, and measures how well an order mixes them.

Each analysis is a file with functions that take a `CommittedStore` or a `Loader`; `search` reads block by block. What
an extraction counts on its way, such as norms and moments, is in `actstore.store.statistics`.
"""

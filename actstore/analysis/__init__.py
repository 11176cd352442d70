"""Analysis reads whole stores: top activations, matching sequences, aligned tokens, and how well an order mixes.

An analysis of rows is a file with a reduction and a function that scans a store with it, as `top_activations` shows;
`scanning` reads. What an extraction counts on its way is in `actstore.store.statistics`.
"""

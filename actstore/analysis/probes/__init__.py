"""Linear probes: predicting labels from the rows of hooks, one probe for each hook.

`fitting` takes the steps in order: `labels` and `splits` say which rows there are and on which side, `sources` gives
passes over them, from the store or from memory, `closed_form` and `logistic` solve, `metrics` measures on documents
that were held out. `probe` and `results` are what comes out.
"""

"""Linear probes: predicting labels from the rows of hooks, one probe for each hook.

`fitting` takes the steps in order: `rows` says which rows there are and on which side, and gives passes over them, from
the store or from memory, as `planning` decides; `solving` runs the `solvers`, and has `metrics` measured on documents
that were held out. `probe` and `results` are what comes out.
"""

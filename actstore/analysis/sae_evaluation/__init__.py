"""How good sparse autoencoders are, measured on the rows of a store: `evaluate.evaluate_sae`.

`saes` makes SAEs of what a user gives, `held_out` chooses rows by document, `sums` adds up in the scan, `figures` are
what comes of it, and `losses` runs the model.
"""

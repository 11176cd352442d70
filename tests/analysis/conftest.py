"""SAELens, imported before the tests are."""

import warnings

with warnings.catch_warnings():
    # Warnings while it is imported are not under test.
    warnings.simplefilter("ignore")
    import sae_lens  # noqa: F401

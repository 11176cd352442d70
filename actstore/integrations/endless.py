"""Loader options for trainers of SAEs, which take batches of one size, without end and without padding."""

import torch

from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.loader.arguments import LoaderArguments
from actstore.loader.dropping.drop import PAD


def endless(store: Store, options: LoaderArguments) -> LoaderArguments:
    """Add the options that the caller cannot set. The type is float32 unless one is given.

    Args:
        store: the store that the rows are in; its padding is dropped if it has any.
        options: the options of the caller.

    Raises:
        LoaderError: the caller has set ``epochs``, ``drop_last`` or ``provenance``.
    """
    for name in ("epochs", "drop_last", "provenance"):
        if name in options:
            raise LoaderError(
                f"{name} cannot be set here: batches are tensors of one size, without end; leave it out"
            )
    completed: LoaderArguments = {"dtype": torch.float32, **options, "epochs": None, "drop_last": True}
    if any(run.plan.request.tokens.packing == "document" for run in store.runs):
        drop = options.get("drop", ())
        completed["drop"] = (drop, PAD) if isinstance(drop, str | int) else (*drop, PAD)
    return completed

"""Options of loaders that trainers of SAEs take batches from: without end, of one size, no padding."""

import torch

from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.loader.arguments import LoaderArguments
from actstore.loader.dropping.drop import PAD


def endless(store: Store, options: LoaderArguments) -> LoaderArguments:
    """Options as they were given, and those that are not for choice. The type is float32 where none was given.

    Args:
        store: whose rows they are. Padding is dropped if it has any.
        options: of the caller.

    Raises:
        LoaderError: ``epochs``, ``drop_last`` or ``provenance`` is among them.
    """
    for name in ("epochs", "drop_last", "provenance"):
        if name in options:
            raise LoaderError(
                f"{name} is not for choice here: batches are tensors of one size, without end; leave it out"
            )
    found: LoaderArguments = {"dtype": torch.float32, **options, "epochs": None, "drop_last": True}
    if any(run.plan.request.tokens.packing == "document" for run in store.runs):
        drop = options.get("drop", ())
        found["drop"] = (drop, PAD) if isinstance(drop, str | int) else (*drop, PAD)
    return found

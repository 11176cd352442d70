"""Data for `trainSAE(data=...)` of dictionary_learning: tensors of one size, without end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

import torch

from actstore.closing import Closing
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.hooks.naming.names import HookName
from actstore.integrations.endless import endless
from actstore.loader.arguments import LoaderArguments
from actstore.loader.batches.batch import Batch, Values, tensors_of
from actstore.loader.loader import Loader
from actstore.loader.pair import PairedLoader
from actstore.opening import open_store
from actstore.pairing import paired


def activations(
    store: Store | str,
    hooks: HookName | Sequence[HookName],
    **options: Unpack[LoaderArguments],
) -> "TrainingData":
    """Batches of one store: [batch_size, d] for one hook, [batch_size, n_hooks, d] for several, for crosscoders.

    Args:
        store: a store, or its path or URL.
        hooks: a name, several names, or a glob; all hooks must have the same width.
        options: as for `Store.loader`. The type is float32 unless ``dtype`` says another, or None for the stored one.
            ``epochs``, ``drop_last`` and ``provenance`` cannot be set, since batches never end and are all of one size.
            Padding is always left out.

    Raises:
        HookError: a hook is not stored.
        LoaderError: the hooks have several widths, an option has an impossible value, or there are fewer rows than a
            batch has.
        StorageError: the store cannot be read.
    """
    opened = open_store(store) if isinstance(store, str) else store
    return TrainingData(opened.loader(hooks, **endless(opened, options)))


def paired_activations(
    stores_and_hooks: Sequence[tuple[Store | str, HookName | Sequence[HookName]]],
    **options: Unpack[LoaderArguments],
) -> "TrainingData":
    """Batches of several stores over the same tokens, [batch_size, n_hooks, d], for crosscoders of several models.

    Args:
        stores_and_hooks: pairs of a store, or its path or URL, and one or several of its hooks; all hooks must have the
            same width. They are stacked in this order.
        options: as for `activations`.

    Raises:
        HookError: a hook is not stored.
        LoaderError: as for `activations`, or the stores are not over the same tokens.
        StorageError: a store cannot be read.
    """
    opened = [
        (open_store(store) if isinstance(store, str) else store, hooks) for store, hooks in stores_and_hooks
    ]
    if not opened:
        raise LoaderError("no store was given; name two or more, each with its hooks")
    return TrainingData(paired(opened, **endless(opened[0][0], options)))


class TrainingData(Closing):
    """An iterator over tensors of one size that never ends. Get it from `activations` or `paired_activations`.

    The values of a hook with several axes, such as heads, are flattened to one axis.
    """

    def __init__(self, loader: Loader | PairedLoader) -> None:
        """
        Args:
            loader: a loader that never ends.
        """
        self.loader = loader
        parts = loader.loaders if isinstance(loader, PairedLoader) else (loader,)
        stores_and_hooks = [(part.store, hook) for part in parts for hook in part.options.hooks]
        widths = {
            f"{hook} of {store.url}": math.prod(store[hook].shape[2:]) for store, hook in stores_and_hooks
        }
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name} has {width}" for name, width in widths.items())
            raise LoaderError(f"hooks that are stacked must have one width, and {listed}; choose others")
        self.config: dict[str, Any] = {
            "stores": [part.store.url for part in parts],
            "hooks": [list(part.options.hooks) for part in parts],
            "order": loader.state_dict()["order"],
        }
        """Plain data that dictionary_learning writes to the ``config.json`` of what it trains."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        """The next batch. It belongs to the caller, who may change it.

        Raises:
            StorageError: rows cannot be read. The next call tries the same batch again.
        """
        return _stacked(next(self.loader))

    def state_dict(self) -> dict[str, Any]:
        """Like `Loader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Like `Loader.load_state_dict`."""
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """Like `Loader.close`."""
        self.loader.close()


def _stacked(batch: Values | Batch | tuple[Values | Batch, ...]) -> torch.Tensor:
    """The values of a batch: [n_rows, d] for one tensor, [n_rows, n, d] for several, in their order."""
    if isinstance(batch, torch.Tensor):
        return batch.flatten(1)
    parts = batch if isinstance(batch, tuple) else (batch,)
    return torch.stack([tensor.flatten(1) for part in parts for tensor in tensors_of(part)], 1)

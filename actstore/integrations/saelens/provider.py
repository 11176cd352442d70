"""The provider of batches for SAELens' trainers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch

from actstore.closing import Closing
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.hooks.naming.names import HookName
from actstore.integrations.endless import endless
from actstore.loader.arguments import LoaderArguments
from actstore.loader.batches.batch import Batch
from actstore.loader.loader import Loader
from actstore.opening import open_store
from actstore.store.committed_store import CommittedStore

Rows = torch.Tensor | dict[str, torch.Tensor]


class DataProvider(Closing):
    """Iterates without end over [batch_size, d_in], or over dicts of these for several hooks. See `data_provider`."""

    def __init__(self, loader: Loader) -> None:
        """
        Args:
            loader: a loader without end whose batches have one size and no provenance.
        """
        self.loader = loader
        self.batch_size = loader.options.batch_size // loader.options.world_size
        """Number of rows in a batch of this rank."""
        self.d_in = {hook: math.prod(self.store[hook].shape[2:]) for hook in self.hooks}
        """Number of elements of a row, by hook."""
        self.n_taken = 0
        """Number of batches that this object gave out."""

    @property
    def store(self) -> CommittedStore:
        """The store that the rows are in."""
        return self.loader.store

    @property
    def hooks(self) -> tuple[str, ...]:
        """The stored names of the hooks, which are the keys of a batch of several hooks."""
        return self.loader.options.hooks

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Rows:
        """The next batch.

        Raises:
            StorageError: rows cannot be read. The next call tries the same batch again.
        """
        batch = next(self.loader)
        assert not isinstance(batch, Batch)
        self.n_taken += 1
        if isinstance(batch, torch.Tensor):
            return batch.flatten(1)
        return {hook: rows.flatten(1) for hook, rows in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, as plain data. Batches that were read ahead do not count."""
        return {"hooks": list(self.hooks), "loader": self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another provider was.

        Raises:
            LoaderError: this is not the state of a provider, or it is one of other hooks or another order of rows.
        """
        try:
            hooks, position = list(state["hooks"]), state["loader"]
        except (KeyError, TypeError) as error:
            raise LoaderError(
                f"{state!r} is not the state of a data provider; give the result of state_dict()"
            ) from error
        if hooks != list(self.hooks):
            raise LoaderError(
                f"the state is of {', '.join(map(str, hooks))}, and this provider reads {', '.join(self.hooks)}; make "
                "it for the same hooks, or start over"
            )
        self.loader.load_state_dict(position)

    def close(self) -> None:
        """End the threads, and unmap files."""
        self.loader.close()


def data_provider(
    store: Store | str | Path,
    hooks: HookName | Sequence[HookName],
    **options: Unpack[LoaderArguments],
) -> DataProvider:
    """Batches for ``SAETrainer``, or with several hooks for ``MultiSAETrainer``, without a language model and without
    end.

    Rows come in epochs, each in an order of its own; rows that do not fill a batch at the end of an epoch are left out
    of it. Padding is always left out. A row is the flattened value at one token: heads times d_head for ``hook_z``.

    Args:
        store: an open store, or its path or URL.
        hooks: one name, for batches [batch_size, d_in]; several, or a glob, for dicts of them by stored name, with rows
            of the same tokens.
        options: as for `Store.loader`: ``batch_size``, ``seed``, ``shuffle``, ``drop`` and so on. The type is float32
            unless ``dtype`` says another, or None for the stored one. ``batch_size`` counts all ranks; each gets an
            equal part, which is the ``train_batch_size_samples`` of its trainer. ``epochs``, ``drop_last`` and
            ``provenance`` cannot be set.

    Raises:
        HookError: a hook is not stored.
        LoaderError: an option has an impossible value, ranks would get unequal parts, or there are too few rows for one
            batch.
        NotCommittedError: a row is not committed.
        StorageError: the store cannot be read.
    """
    batch_size, world_size = options["batch_size"], options.get("world_size", 1)
    if world_size > 0 and batch_size % world_size:
        raise LoaderError(
            f"batch_size is {batch_size}, for {world_size} ranks together; SAELens needs equally many rows in every "
            f"batch, so ask for a multiple of {world_size}"
        )
    opened = store if isinstance(store, Store) else open_store(str(store))
    return DataProvider(opened.loader(hooks, **endless(opened, options)))

"""What SAELens' trainers take batches from."""

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
    """An iterator over [batch_size, d_in], without end; of several hooks, over dicts of these. See `data_provider`."""

    def __init__(self, loader: Loader) -> None:
        """
        Args:
            loader: one that never ends and gives batches of one size, without provenance.
        """
        self.loader = loader
        self.batch_size = loader.options.batch_size // loader.options.world_size
        """Rows that each batch has, of this rank."""
        self.d_in = {hook: math.prod(self.store[hook].shape[2:]) for hook in self.hooks}
        """Elements of a row, by hook."""
        self.n_taken = 0
        """Batches that this object gave out."""

    @property
    def store(self) -> CommittedStore:
        """Whose rows they are."""
        return self.loader.store

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names as they are stored, which are the keys of a batch of several hooks."""
        return self.loader.options.hooks

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Rows:
        """The next batch.

        Raises:
            StorageError: rows cannot be read. The next call tries the same batch again.
        """
        found = next(self.loader)
        assert not isinstance(found, Batch)
        self.n_taken += 1
        if isinstance(found, torch.Tensor):
            return found.flatten(1)
        return {hook: rows.flatten(1) for hook, rows in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Which batch is next, as plain data. Batches that were read ahead do not count."""
        return {"hooks": list(self.hooks), "loader": self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another provider was.

        Raises:
            LoaderError: it is no such state, or of other hooks, or of another order of rows.
        """
        try:
            hooks, position = list(state["hooks"]), state["loader"]
        except (KeyError, TypeError) as error:
            raise LoaderError(
                f"{state!r} is no state of a data provider; give what state_dict() gave"
            ) from error
        if hooks != list(self.hooks):
            raise LoaderError(
                f"the state is of {', '.join(map(str, hooks))}, and this provider reads {', '.join(self.hooks)}; make "
                "it for the same hooks, or begin anew"
            )
        self.loader.load_state_dict(position)

    def close(self) -> None:
        """End the threads, and give back what is mapped."""
        self.loader.close()


def data_provider(
    store: Store | str | Path,
    hooks: HookName | Sequence[HookName],
    **options: Unpack[LoaderArguments],
) -> DataProvider:
    """Batches for ``SAETrainer``, or with several hooks for ``MultiSAETrainer``: no language model, no end.

    Rows come in epochs, each in an order of its own; what does not fill a batch at the end of an epoch is left out of
    that epoch. Padding is always left out. A row is the flattened value at one token: heads times d_head for
    ``hook_z``.

    Args:
        store: an open store, or its path or URL.
        hooks: a name, for batches [batch_size, d_in]; several, or a glob, for dicts of them by stored name, with rows
            of the same tokens.
        options: as for `Store.loader`: ``batch_size``, ``seed``, ``shuffle``, ``drop`` and so on. The type is float32
            unless ``dtype`` says another, or None for the stored one. ``batch_size`` is of all ranks together, and each
            gets an equal part, which is what its trainer needs as ``train_batch_size_samples``. ``epochs``,
            ``drop_last`` and ``provenance`` are not for choice.

    Raises:
        HookError: a hook is not stored.
        LoaderError: an option that cannot be, ranks without equal parts, or too few rows for one batch.
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

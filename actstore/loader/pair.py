"""Several stores over the same tokens, under one permutation: for transcoders, crosscoders and model diffing."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.closing import Closing
from actstore.errors import LoaderError
from actstore.hooks.naming.names import HookName
from actstore.loader.arguments import LoaderArguments
from actstore.loader.batches.batch import Batch, Values
from actstore.loader.loader import Loader
from actstore.loader.metrics import Metrics
from actstore.loader.options import chosen_hooks
from actstore.store.store import Store, open_store

if TYPE_CHECKING:
    Hooks = HookName | Sequence[HookName]


def paired(
    stores_and_hooks: "Sequence[tuple[Store | str, Hooks]]", **options: Unpack[LoaderArguments]
) -> "PairedLoader":
    """A loader over several stores whose batches hold the same rows of each: row i is the same token everywhere.

    Two hooks of one store need no pair: give both to `Store.loader`.

    Args:
        stores_and_hooks: two or more pairs of a store, or its path or URL, and the hooks to load, as for
            `Store.loader`.
        options: as for `Store.loader`, the same for all. Names in ``drop`` are tokens of the first store's model.

    Raises:
        HookError: a hook is not stored.
        LoaderError: the stores have different tokens, their rows cannot be in one order, or an option has an impossible
            value.
        NotCommittedError: a row is not committed.
        StorageError: something cannot be read.
    """
    if len(stores_and_hooks) < 2:
        raise LoaderError(
            f"a pair is of two stores or more, and {len(stores_and_hooks)} were given; name them all"
        )
    if options.get("max_norm") is not None:
        raise LoaderError(
            "max_norm would drop other rows in each store; find the rows to keep in one of them, and give them as mask"
        )
    stores = [open_store(store) if isinstance(store, str) else store for store, _ in stores_and_hooks]
    for store in stores[1:]:
        _check_tokens(stores[0], store)
    first = stores[0].loader(stores_and_hooks[0][1], **options)
    if first.options.drop.is_nonfinite_dropped:
        raise LoaderError(
            "drop='nonfinite' would drop other rows in each store; find the rows to keep, and give them as mask"
        )
    loaders = [first]
    for store, (_, hooks) in zip(stores[1:], stores_and_hooks[1:], strict=True):
        chosen, is_single = chosen_hooks(store, hooks)
        own = dataclasses.replace(first.options, hooks=chosen, is_single=is_single)
        loaders.append(Loader(store, own))
        _check_order(first, loaders[-1])
    return PairedLoader(loaders)


def _check_tokens(first: Store, other: Store) -> None:
    if first.shape != other.shape:
        differ = f"shapes {first.shape} and {other.shape}, of sequences and positions"
    else:
        ours, theirs = _tokens(first), _tokens(other)
        if ours == theirs:
            return
        if len(ours) != len(theirs):
            differ = f"their tokens from {len(ours)} and {len(theirs)} runs"
        else:
            which = next(i for i, (left, right) in enumerate(zip(ours, theirs, strict=True)) if left != right)
            (sha256, n_sequences), (other_sha256, n_others) = ours[which], theirs[which]
            differ = f"tokens_sha256 {sha256[:12]} and {other_sha256[:12]} over {n_sequences} and {n_others} sequences"
    raise LoaderError(
        f"{first.url} and {other.url} are not over the same tokens: they have {differ}; extract both from one source "
        "with the same packing, seed and max_tokens"
    )


def _tokens(store: Store) -> list[tuple[str, int]]:
    """The checksum of the tokens and the number of sequences of each run that has tokens of its own."""
    plans = [run.plan for run in store.runs if run.plan.has_own_tokens]
    return [(plan.tokens_sha256, plan.n_sequences) for plan in plans]


def _check_order(first: Loader, other: Loader) -> None:
    ours, theirs = (loader.state_dict()["order"] for loader in (first, other))
    differ = [name for name in ours if ours[name] != theirs[name]]
    if differ:
        raise LoaderError(
            f"{first.store.url} and {other.store.url} do not have one order of rows: they differ in "
            f"{', '.join(differ)}; shuffle='global' does not depend on shards, or extract both with one segment_size"
        )


class PairedLoader(Closing):
    """An iterator over tuples, one batch of each store in the order of the stores. Get it from `paired`.

    Its state is saved and restored with `state_dict` and `load_state_dict`, as with `Loader`.
    """

    def __init__(self, loaders: Sequence[Loader]) -> None:
        """
        Args:
            loaders: loaders with the same order.
        """
        self._loaders = list(loaders)
        self._place = loaders[0].place
        """The place of the next batch. After an error or an interruption some of the loaders may be elsewhere."""

    @property
    def loaders(self) -> tuple[Loader, ...]:
        """The loader of each store. Do not iterate over them."""
        return tuple(self._loaders)

    @property
    def n_rows(self) -> int:
        """Number of rows of an epoch that are not dropped, all ranks together."""
        return self._loaders[0].n_rows

    @property
    def n_batches(self) -> int:
        """Number of batches of an epoch."""
        return self._loaders[0].n_batches

    def batch(self, k: int, epoch: int = 0) -> tuple[Values | Batch, ...]:
        """Like `Loader.batch`, for each store."""
        return tuple(loader.batch(k, epoch) for loader in self._loaders)

    def rows(self, k: int, epoch: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequences and positions of the rows of any batch, both [n_rows]. Nothing is read."""
        return self._loaders[0].rows(k, epoch)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Values | Batch, ...]:
        """The next batch.

        Raises:
            StopIteration: all epochs are over.
            StorageError: rows cannot be read. The next call tries the same batch again.
        """
        for loader in self._loaders:
            if loader.place != self._place:
                loader.seek(*self._place)
        taken = [next(loader) for loader in self._loaders]
        self._place = self._loaders[0].place
        return tuple(taken)

    def state_dict(self) -> dict[str, Any]:
        """Like `Loader.state_dict`. A loader of one of the stores can load it, too."""
        epoch, k = self._place
        states = [loader.state_dict() for loader in self._loaders]
        loaders = [loader_identity for state in states for loader_identity in state["loaders"]]
        return states[0] | {"epoch": epoch, "batch": k, "loaders": loaders}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Like `Loader.load_state_dict`.

        Raises:
            LoaderError: this is no state of a loader, or it is one of another order.
        """
        for loader in self._loaders:
            loader.load_state_dict(state)
        self._place = self._loaders[0].place

    def metrics(self) -> tuple[Metrics, ...]:
        """What was counted so far, for each store."""
        return tuple(loader.metrics() for loader in self._loaders)

    def close(self) -> None:
        """End the threads, and unmap files. The loader can be used again."""
        for loader in self._loaders:
            loader.close()

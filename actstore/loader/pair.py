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
    """A loader over several stores, whose batches hold the same rows of each: row i is the same token everywhere.

    Two hooks of one store need no pair: give `Store.loader` both.

    Args:
        stores_and_hooks: a store, or its path or URL, and what to load of it, as for `Store.loader`; two or more.
        options: as for `Store.loader`, the same for all. Names in ``drop`` are looked up in the model of the first.

    Raises:
        HookError: a hook is not stored.
        LoaderError: the stores have other tokens, or rows cannot be in one order; or an option that cannot be.
        NotCommittedError: a row is not committed.
        StorageError: what must be read cannot be.
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
    """Checksum and number of sequences of each run that has tokens, whatever its name."""
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

    It goes on where another one was, with `state_dict` and `load_state_dict`, as `Loader` does.
    """

    def __init__(self, loaders: Sequence[Loader]) -> None:
        """
        Args:
            loaders: of one order.
        """
        self._loaders = list(loaders)
        self._place = loaders[0].place
        """Of the next batch. After an error, or an interruption, some of the loaders may be elsewhere."""

    @property
    def loaders(self) -> tuple[Loader, ...]:
        """Of each store. They are not to be iterated over."""
        return tuple(self._loaders)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch, of all ranks: those that are not dropped."""
        return self._loaders[0].n_rows

    @property
    def n_batches(self) -> int:
        """Of an epoch."""
        return self._loaders[0].n_batches

    def batch(self, k: int, epoch: int = 0) -> tuple[Values | Batch, ...]:
        """As `Loader.batch`, of each store."""
        return tuple(loader.batch(k, epoch) for loader in self._loaders)

    def rows(self, k: int, epoch: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequences and positions of any batch, both [n_rows]; nothing is read."""
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
        """As `Loader.state_dict`; a loader of one of the stores goes on from it, too."""
        epoch, k = self._place
        states = [loader.state_dict() for loader in self._loaders]
        of = [each for state in states for each in state["loaders"]]
        return states[0] | {"epoch": epoch, "batch": k, "loaders": of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Loader.load_state_dict`.

        Raises:
            LoaderError: it is no such state, or of another order.
        """
        for loader in self._loaders:
            loader.load_state_dict(state)
        self._place = self._loaders[0].place

    def metrics(self) -> tuple[Metrics, ...]:
        """How it went until now, by store."""
        return tuple(loader.metrics() for loader in self._loaders)

    def close(self) -> None:
        """End the threads, and give back what is mapped. It can be used again."""
        for loader in self._loaders:
            loader.close()

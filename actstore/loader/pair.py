"""Several loaders, over stores of the same tokens and under one permutation, that go on together."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from actstore.closing import Closing
from actstore.errors import LoaderError
from actstore.loader.batches.batch import Batch, Values
from actstore.loader.loader import Loader
from actstore.loader.metrics import Metrics
from actstore.store.committed_store import CommittedStore

_BLOCK: Final = 1 << 22
"""Positions that are compared together."""


class PairedLoader(Closing):
    """An iterator over tuples, one batch of each store in the order of the stores. Get it from
    `actstore.pairing.paired`.

    Its state is saved and restored with `state_dict` and `load_state_dict`, as with `Loader`.
    """

    def __init__(self, loaders: Sequence[Loader]) -> None:
        """
        Args:
            loaders: loaders with the same order, as `check_order` says.
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
        """Sequences and positions of the rows of any batch, both [n_rows]. No activations are read."""
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
            LoaderError: this is not the state of a loader, or it is one of another order.
        """
        for loader in self._loaders:
            loader.load_state_dict(state)
        self._place = self._loaders[0].place

    def metrics(self) -> tuple[Metrics, ...]:
        """The metrics so far, one for each store."""
        return tuple(loader.metrics() for loader in self._loaders)

    def close(self) -> None:
        """End the threads, and unmap files. The loader can be used again."""
        for loader in self._loaders:
            loader.close()


class AlignedLoader(PairedLoader):
    """Like `PairedLoader`, over stores with different tokens of one text: row i of one store and row i of the other end
    at the same character. Get it from `actstore.pairing.aligned`.

    `rows` gives sequences and positions in the first store, ``loaders[1].rows`` those in the other.
    """

    def __init__(self, loaders: Sequence[Loader], n_documents: int, n_left_out: int) -> None:
        """
        Args:
            loaders: loaders of as many rows each, in one order.
            n_documents: documents of which both stores have tokens.
            n_left_out: documents of these that have no aligned tokens, as their texts differ.
        """
        super().__init__(loaders)
        self.n_documents = n_documents
        self.n_left_out = n_left_out

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, and the state of each loader, as plain data for JSON."""
        epoch, k = self._place
        return {"epoch": epoch, "batch": k, "aligned": [loader.state_dict() for loader in self._loaders]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Like `Loader.load_state_dict`.

        Raises:
            LoaderError: this is not the state of an aligned loader, or it is one of another order.
        """
        states = state.get("aligned")
        if not isinstance(states, list) or len(states) != len(self._loaders):
            raise LoaderError(
                f"{str(state)[:80]} is not the state of an aligned loader; give the result of its state_dict()"
            )
        place = {name: state.get(name) for name in ("epoch", "batch")}
        for loader, of_one in zip(self._loaders, states, strict=True):
            loader.load_state_dict({**of_one, **place})
        self._place = self._loaders[0].place


def check_tokens(first: CommittedStore, other: CommittedStore) -> None:
    """See that row i of two stores is the same token.

    Raises:
        LoaderError: it is not, or may not be.
    """
    if first.shape != other.shape:
        differ = f"shapes {first.shape} and {other.shape}, of sequences and positions (or slots)"
    else:
        ours, theirs = _tokens(first), _tokens(other)
        if ours == theirs:
            _check_positions(first, other)
            return
        if len(ours) != len(theirs):
            differ = f"their tokens from {len(ours)} and {len(theirs)} runs"
        else:
            which = next(i for i, (left, right) in enumerate(zip(ours, theirs, strict=True)) if left != right)
            (sha256, n_sequences), (other_sha256, n_others) = ours[which], theirs[which]
            differ = f"tokens_sha256 {sha256[:12]} and {other_sha256[:12]} over {n_sequences} and {n_others} sequences"
    raise LoaderError(
        f"{first.url} and {other.url} are not over the same tokens: they have {differ}; extract both from one source "
        "with the same packing, seed and max_tokens, or align them by characters with actstore.pairing.aligned"
    )


def _check_positions(first: CommittedStore, other: CommittedStore) -> None:
    """See that two stores over the same tokens have the same of their positions.

    Raises:
        LoaderError: they do not.
    """
    ours, theirs = first.positions, other.positions
    is_same = (ours is None) == (theirs is None)
    if is_same and ours is not None and theirs is not None:
        step = max(1, _BLOCK // ours.shape[1])
        spans = (slice(start, start + step) for start in range(0, len(ours), step))
        is_same = all(np.array_equal(ours[span], theirs[span]) for span in spans)
    if not is_same:
        chosen = [store.plan.request.tokens.positions or "all" for store in (first, other)]
        raise LoaderError(
            f"{first.url} and {other.url} have different positions of the same tokens ({chosen[0]} and {chosen[1]}); "
            "extract both with the same positions"
        )


def _tokens(store: CommittedStore) -> list[tuple[str, int]]:
    """Checksum and number of sequences of each run that has tokens, whatever its name."""
    plans = [run.plan for run in store.runs if run.plan.has_own_tokens]
    return [(plan.tokens_sha256, plan.n_sequences) for plan in plans]


def check_order(first: Loader, other: Loader) -> None:
    """See that two loaders take rows of the same numbers at the same time.

    Raises:
        LoaderError: they do not.
    """
    ours, theirs = (loader.state_dict()["order"] for loader in (first, other))
    differ = [name for name in ours if ours[name] != theirs[name]]
    if differ:
        raise LoaderError(
            f"{first.store.url} and {other.store.url} do not have one order of rows: they differ in "
            f"{', '.join(differ)}; shuffle='global' does not depend on shards, or extract both with one segment_size"
        )

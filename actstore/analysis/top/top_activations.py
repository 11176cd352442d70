"""The rows of a store with the largest values of each feature, exact."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.features import Features, features_of
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.analysis.top.result import TopActivations
from actstore.analysis.top.sampled_rows import SampledRows, SampleState, by_value
from actstore.errors import JobError

if TYPE_CHECKING:
    import torch

    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

__all__ = ["Per", "TopActivations", "TopRows", "TopState", "top_activations"]

Per = Literal["row", "sequence"]
_SPARSE: Final = 8
"""Candidates are few if they are at most 1 value in so many."""


@dataclass(frozen=True)
class TopRows:
    """Reduction to the k rows of each feature with the largest values. Of equal ones, the first in the store counts."""

    hook: str
    features: Features
    k: int
    per: Per = "row"
    """``sequence`` takes only the largest row of each sequence."""
    above: float = -math.inf
    """Values must be larger than this."""

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook,)

    def identity(self) -> str:
        return f"top {self.hook} {self.k} {self.per} {self.above} {self.features.identity()}"

    def start(self) -> "TopState":
        return TopState(self)

    def restore(self, arrays: Arrays) -> "TopState":
        """See `Reduction.restore`."""
        state = TopState(self)
        state.values = np.asarray(arrays["values"], np.float32).copy()
        state.addresses = np.asarray(arrays["addresses"], np.int64).copy()
        state.n_nan = int(arrays["n_nan"][0])
        if state.values.shape != state.addresses.shape or state.values.shape[1:] != (self.k,):
            raise ValueError("the state has another shape")
        return state

    def finish(self, state: "TopState") -> "TopState":
        """The state, which is the result."""
        return state


class TopState:
    """The largest values of each feature so far, descending, and where they are."""

    def __init__(self, reduction: TopRows) -> None:
        self._of = reduction
        self.values = np.empty((0, reduction.k), np.float32)
        """[n_features, k]; -inf where there are fewer. No features before the first row."""
        self.addresses = np.empty((0, reduction.k), np.int64)
        """Sequence times width plus entry, [n_features, k]; -1 where there are fewer."""
        self.n_nan = 0
        """Values that were NaN, and not ranked."""

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        import torch

        values = block.features(self._of.hook, self._of.features)
        self._expect(values.shape[1])
        # A sum is NaN if a value is.
        if not values.sum().isfinite():
            is_nan = values.isnan()
            self.n_nan += int(is_nan.sum())
            values = values.masked_fill(is_nan, -math.inf)
        rows = None
        if self._of.per == "sequence":
            values, rows = largest_of_each(values, block.sequences)
        floor = torch.from_numpy(self.values[:, -1]).clamp(min=self._of.above)
        candidates = (values > floor).numpy()
        n_candidates = np.count_nonzero(candidates)
        if n_candidates * _SPARSE > candidates.size and len(values) > self._of.k:
            # Few are among the first k of a feature. Where most values are 0, sorting the others is faster.
            kth = values.T.contiguous().topk(self._of.k, dim=1).values[:, -1]
            candidates &= (values >= kth).numpy()
        places = np.flatnonzero(candidates)
        found = values.numpy().reshape(-1)[places]
        feature = places % values.shape[1]
        if len(places) and np.bincount(feature).max() > self._of.k:
            first = _first_of_each(feature, found, self._of.k)
            places, found, feature = places[first], found[first], feature[first]
        at = places // values.shape[1] if rows is None else rows.numpy().reshape(-1)[places]
        self._add(feature, found, block.addresses[at])

    def merge(self, other: Self) -> None:
        """Take the largest values of rows that follow."""
        if not len(other.values):
            return
        self._expect(len(other.values))
        feature, place = np.nonzero(other.addresses >= 0)
        self._add(feature, other.values[feature, place], other.addresses[feature, place])
        self.n_nan += other.n_nan

    def arrays(self) -> Arrays:
        """All that is known."""
        return {"values": self.values, "addresses": self.addresses, "n_nan": np.array([self.n_nan])}

    def _expect(self, n_features: int) -> None:
        if not len(self.values):
            k = self._of.k
            self.values = np.full((n_features, k), -math.inf, np.float32)
            self.addresses = np.full((n_features, k), -1, np.int64)

    def _add(
        self, feature: NDArray[np.int64], values: NDArray[np.float32], addresses: NDArray[np.int64]
    ) -> None:
        """Take some more values, in any order."""
        if not len(feature):
            return
        k = self._of.k
        touched = np.unique(feature)
        feature = np.concatenate([np.repeat(touched, k), feature])
        values = np.concatenate([self.values[touched].reshape(-1), values])
        addresses = np.concatenate([self.addresses[touched].reshape(-1), addresses])
        # An empty place has -inf, and must stay behind a row that has it, too.
        order = np.lexsort((addresses, addresses < 0, -values, feature))
        feature, values, addresses = feature[order], values[order], addresses[order]
        starts = np.searchsorted(feature, touched)
        rank = np.arange(len(feature)) - np.repeat(starts, np.diff(starts, append=len(feature)))
        best = rank < k
        self.values[touched] = values[best].reshape(-1, k)
        self.addresses[touched] = addresses[best].reshape(-1, k)


def _first_of_each(feature: NDArray[np.int64], values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Places of the k largest values of each feature, of equal ones the first. Stable sorts one after the other take a
    third of the time of a sort by several keys.
    """
    order = np.argsort(-values, kind="stable")
    order = order[np.argsort(feature[order].astype(np.min_scalar_type(feature.max())), kind="stable")]
    ranked = feature[order]
    (starts,) = np.nonzero(np.diff(ranked, prepend=-1))
    rank = np.arange(len(ranked)) - np.repeat(starts, np.diff(starts, append=len(ranked)))
    return order[rank < k]


def largest_of_each(
    values: "torch.Tensor", sequences: NDArray[np.int64]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The largest row of each sequence, the first of equals: values and rows, both [n_sequences, n_features]."""
    import torch

    starts = np.flatnonzero(np.diff(sequences, prepend=-1))
    largest, rows = [], []
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(sequences)], strict=True):
        part = values[start:stop]
        largest.append(part.amax(0))
        # `max` of torch gives any of equal ones.
        rows.append((part == largest[-1]).to(torch.uint8).argmax(0) + start)
    return torch.stack(largest), torch.stack(rows)


def top_activations(
    store: "CommittedStore",
    hook: "HookName",
    of: Any,
    k: int = 20,
    *,
    per: Per = "row",
    above: float | None = None,
    by_quantile: int | None = None,
    **options: Unpack[ScanOptions],
) -> TopActivations:
    """Find the rows with the largest values of each feature: exact, in one pass over the store.

    The largest say little about what a feature does in the rest of its range. ``by_quantile=4`` gives k rows of each
    quarter of its values instead, drawn at random from all rows at which it is active (the same at every call): a
    sample of 4 k rows, the largest first, in quarters.

    Args:
        store: the store.
        hook: a stored hook.
        of: directions [n_features, d]; a list of neurons; an SAE of SAELens or dictionary_learning, or anything with
            ``encode``; or a function of rows [n_rows, *shape] that gives [n_rows, n_features].
        k: rows of each feature.
        per: ``sequence`` takes only the largest row of each sequence.
        above: values must be larger than this. None takes any value, or those above 0 of an SAE.
        by_quantile: number of quantiles; None for the largest rows.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid.
        ActstoreError: see `scan`.
    """
    if not isinstance(k, int) or k < 1:
        raise JobError(f"k is {k}; it must be a whole number, 1 or more")
    if per not in ("row", "sequence"):
        raise JobError(f"per is {per!r}; it can be row or sequence")
    array = store.array_of(hook)
    features = features_of(of, array.shape)
    if above is None:
        above = 0.0 if features.is_sparse else -math.inf
    if by_quantile is None:
        scanned = scan(store, {"top": TopRows(array.name, features, k, per, above)}, **options)
        top: TopState | SampleState = scanned.results["top"]
        values, addresses, quantiles = top.values, top.addresses, None
    else:
        if by_quantile < 1 or per != "row":
            raise JobError(
                f"by_quantile is {by_quantile} and per is {per!r}; it must be 1 or more, for per='row'"
            )
        scanned = scan(store, {"top": SampledRows(array.name, features, k * by_quantile, above)}, **options)
        top = scanned.results["top"]
        values, addresses, quantiles = by_value(top.values, top.addresses, by_quantile)
    is_there = addresses >= 0
    where, entries = np.divmod(addresses, store.shape[1])
    positions, documents = (np.full(where.shape, -1, np.int64) for _ in range(2))
    rows, inverse = np.unique(where[is_there], return_inverse=True)
    if len(rows):
        positions[is_there] = store.entries.positions(rows)[inverse, entries[is_there]]
        documents[is_there] = store.documents[rows.tolist()][inverse, positions[is_there]]
    return TopActivations(
        hook=array.name,
        values=np.where(is_there, values, np.nan).astype(np.float32),
        sequences=np.where(is_there, where, -1),
        positions=positions,
        documents=documents,
        n_rows=scanned.n_rows,
        n_not_finite=sum(scanned.n_not_finite.values()) + top.n_nan,
        store=store,
        quantiles=quantiles,
    )

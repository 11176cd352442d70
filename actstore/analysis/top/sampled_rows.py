"""Rows drawn at random from those at which a feature is active: the same ones however the work is divided."""

import math
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.features import Features
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays

_SPARSE: Final = 8
"""Features are sparse if at most 1 value in so many is to be looked at."""


@dataclass(frozen=True)
class SampledRows:
    """Reduction to n rows of each feature, drawn without repeats from all rows at which it is active.

    Each row has a number that is made from its place, as if at random, and those with the largest numbers are kept.
    """

    hook: str
    features: Features
    n: int
    above: float
    """A feature is active where its value is larger than this."""

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook,)

    def identity(self) -> str:
        return f"sample {self.hook} {self.n} {self.above} {self.features.identity()}"

    def start(self) -> "SampleState":
        return SampleState(self)

    def restore(self, arrays: Arrays) -> "SampleState":
        """See `Reduction.restore`."""
        state = SampleState(self)
        state.values, state.addresses = arrays["values"].copy(), arrays["addresses"].copy()
        state.n_nan = int(arrays["n_nan"][0])
        if state.values.shape != state.addresses.shape or state.values.shape[1:] != (self.n,):
            raise ValueError("the state has another shape")
        return state

    def finish(self, state: "SampleState") -> "SampleState":
        """The state, which is the result."""
        return state


class SampleState:
    """The rows so far, those with the largest numbers first."""

    def __init__(self, reduction: SampledRows) -> None:
        self._of = reduction
        self.values = np.empty((0, reduction.n), np.float32)
        """[n_features, n]; NaN where there are fewer. No features before the first row."""
        self.addresses = np.empty((0, reduction.n), np.int64)
        """Sequence times width plus entry, [n_features, n]; -1 where there are fewer."""
        self.n_nan = 0
        """Values that were NaN, and not drawn."""

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        values = block.features(self._of.hook, self._of.features).numpy()
        self._expect(values.shape[1])
        if not math.isfinite(values.sum()):
            self.n_nan += int(np.isnan(values).sum())
        numbers = numbers_of(block.addresses)
        last = self.addresses[:, -1]
        floor = np.where(last < 0, np.uint64(0), numbers_of(last))
        candidates = (values > self._of.above) & (numbers[:, None] >= floor)
        if np.count_nonzero(candidates) * _SPARSE > candidates.size:
            # Of many, only those with the largest numbers of each feature, before they are sorted.
            order = np.argsort(numbers, kind="stable")[::-1]
            is_first = np.cumsum(candidates[order], axis=0, dtype=np.int32) <= self._of.n
            candidates[order] &= is_first
        places = np.flatnonzero(candidates)
        row, feature = np.divmod(places, values.shape[1])
        self._add(feature, values.reshape(-1)[places], block.addresses[row])

    def merge(self, other: Self) -> None:
        """Take the rows that follow."""
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
            self.values = np.full((n_features, self._of.n), np.nan, np.float32)
            self.addresses = np.full((n_features, self._of.n), -1, np.int64)

    def _add(
        self, feature: NDArray[np.int64], values: NDArray[np.float32], addresses: NDArray[np.int64]
    ) -> None:
        """Take some more rows, in any order."""
        if not len(feature):
            return
        n, touched = self._of.n, np.unique(feature)
        known_feature, place = np.nonzero(self.addresses[touched] >= 0)
        known = touched[known_feature]
        feature = np.concatenate([known, feature])
        values = np.concatenate([self.values[known, place], values])
        addresses = np.concatenate([self.addresses[known, place], addresses])
        # The numbers are all different; sorted downwards.
        order = np.lexsort((~numbers_of(addresses), feature))
        feature, values, addresses = feature[order], values[order], addresses[order]
        starts = np.searchsorted(feature, touched)
        rank = np.arange(len(feature)) - np.repeat(starts, np.diff(starts, append=len(feature)))
        kept = rank < n
        self.values[feature[kept], rank[kept]] = values[kept]
        self.addresses[feature[kept], rank[kept]] = addresses[kept]


def numbers_of(addresses: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number of each address, as if at random, and different for all: SplitMix64 (Steele, Lea and Flood, 2014)."""
    x: NDArray[np.uint64] = addresses.astype(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def by_value(
    values: NDArray[np.float32], addresses: NDArray[np.int64], n_quantiles: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """The rows of each feature in the order of their values, largest first, and the quantile of each.

    Args:
        values, addresses: as in `SampleState`.
        n_quantiles: number of parts of equal size.

    Returns:
        Values, addresses and quantiles, 0 for the largest values and -1 where there are fewer rows, [n_features, n].
    """
    feature, place = np.nonzero(addresses >= 0)
    found, at = values[feature, place], addresses[feature, place]
    order = np.lexsort((at, -found, feature))
    found, at, feature = found[order], at[order], feature[order]
    counts = np.bincount(feature, minlength=len(values))
    rank = np.arange(len(feature)) - np.repeat(np.cumsum(counts) - counts, counts)
    sorted_values, sorted_at = np.full_like(values, np.nan), np.full_like(addresses, -1)
    quantiles = np.full_like(addresses, -1)
    sorted_values[feature, rank], sorted_at[feature, rank] = found, at
    quantiles[feature, rank] = rank * n_quantiles // counts[feature]
    return sorted_values, sorted_at, quantiles

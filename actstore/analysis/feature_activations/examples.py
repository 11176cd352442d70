"""Reduction to examples of each feature: its largest rows, and samples from intervals of its values.

Values of the rows around an example are taken along, since whole sequences are in a block: nothing is encoded twice.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.feature_activations.binning import NO_VALUE, bins_of, exponents_of
from actstore.analysis.features import Features
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays
from actstore.analysis.top.top_activations import largest_of_each

if TYPE_CHECKING:
    import torch

_ENTRIES: Final = 1 << 22
"""Values that are looked at together, which bounds memory where most are above 0."""
_LAST: Final = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Examples:
    """Reduction to examples of each feature, with the values of the feature around them."""

    hook: str
    features: Features
    k: int
    """Largest rows of each feature; of a sequence, only its largest row can be among them."""
    n_intervals: int
    """Intervals of equal width, a power of two; the largest value is in the upper half of them."""
    n_samples: int
    """Rows from each interval of values above 0."""
    before: int
    after: int
    """Positions before and after each row whose values are kept."""
    above: float
    """The largest rows are larger than this."""
    seed: int = 0
    """Samples are the rows whose hashed addresses are lowest; another seed gives other ones."""

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook,)

    @property
    def n_groups(self) -> int:
        """Groups of examples of a feature: the intervals, and the largest rows behind them."""
        return self.n_intervals + 1

    def identity(self) -> str:
        numbers = (self.k, self.n_intervals, self.n_samples, self.before, self.after, self.above, self.seed)
        return f"examples {self.hook} {numbers} {self.features.identity()}"

    def start(self) -> "ExamplesState":
        return ExamplesState(self)

    def restore(self, arrays: Arrays) -> "ExamplesState":
        """See `Reduction.restore`."""
        state = ExamplesState(self)
        state.exponents = np.asarray(arrays["exponents"], np.int32)
        state.found = Found(
            np.asarray(arrays["group"], np.int64),
            np.asarray(arrays["key"], np.uint64),
            np.asarray(arrays["values"], np.float32),
            np.asarray(arrays["addresses"], np.int64),
        )
        state.windows = np.asarray(arrays["windows"], np.float32)
        if state.windows.shape != (len(state.found.group), self.before + 1 + self.after):
            raise ValueError("the state has another shape")
        return state

    def finish(self, state: "ExamplesState") -> "ExamplesState":
        """The state, which is the result."""
        return state


@dataclass(frozen=True)
class Found:
    """Examples, by group and then by key: feature 0 with its intervals and its largest rows, feature 1, ..."""

    group: NDArray[np.int64]
    """Feature times groups of a feature plus interval, [n]; behind the last interval come the largest rows."""
    key: NDArray[np.uint64]
    """Examples with lower keys go first, and then those with lower addresses, [n]."""
    values: NDArray[np.float32]
    addresses: NDArray[np.int64]

    def __getitem__(self, chosen: NDArray[np.int64]) -> "Found":
        return Found(self.group[chosen], self.key[chosen], self.values[chosen], self.addresses[chosen])

    def and_also(self, other: "Found") -> "Found":
        """These and others, unsorted."""
        return Found(
            np.concatenate([self.group, other.group]),
            np.concatenate([self.key, other.key]),
            np.concatenate([self.values, other.values]),
            np.concatenate([self.addresses, other.addresses]),
        )


class ExamplesState:
    """The examples so far."""

    def __init__(self, reduction: Examples) -> None:
        self._of = reduction
        self.exponents: NDArray[np.int32] = np.empty(0, np.int32)
        """The intervals of each feature end at two to the power of this, [n_features]."""
        self.found = Found(
            np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.float32), np.empty(0, np.int64)
        )
        self.windows: NDArray[np.float32] = np.empty((0, reduction.before + 1 + reduction.after), np.float32)
        """Values of the feature around each row, [n, before + 1 + after]; NaN where no row was taken."""

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        import torch

        values = block.features(self._of.hook, self._of.features)
        ranked = values
        # A sum is not finite if a value is not. It may also overflow, which only takes time.
        if not values.sum().isfinite():
            ranked = values.masked_fill(~values.isfinite(), -torch.inf)
        self._widen(exponents_of(ranked.amax(0).numpy()))
        sampled = self._sampled(ranked, hashed(block.addresses, self._of.seed))
        largest = self._largest(ranked, block.sequences)
        feature, row, group, key = (np.concatenate(both) for both in zip(sampled, largest, strict=True))
        if not len(row):
            return
        new = Found(group, key, values.numpy()[row, feature], block.addresses[row])
        n_old, both = len(self.found.group), self.found.and_also(new)
        kept = self._first(both)
        is_new = kept >= n_old
        windows = np.empty((len(kept), self.windows.shape[1]), np.float32)
        windows[~is_new] = self.windows[kept[~is_new]]
        chosen = kept[is_new] - n_old
        windows[is_new] = self._windows_of(block, values.numpy(), row[chosen], feature[chosen])
        self.found, self.windows = both[kept], windows

    def _sampled(self, values: "torch.Tensor", key_of_row: NDArray[np.uint64]) -> "tuple[NDArray[Any], ...]":
        """Rows that may be among the samples: feature, row, group and key."""
        of = self._of
        n_features = values.shape[1]
        highest = self._highest_keys()
        n_rows = max(1, _ENTRIES // n_features)
        parts = []
        for start in range(0, len(values) if of.n_samples else 0, n_rows):
            flat = values[start : start + n_rows].contiguous().numpy().reshape(-1)
            (places,) = np.nonzero(flat > 0)
            row, feature = np.divmod(places, n_features)
            interval = bins_of(flat[places], self.exponents[feature], of.n_intervals)
            group = feature * of.n_groups + interval
            key = key_of_row[row + start]
            may = key < highest[group]
            parts.append((feature[may], row[may] + start, group[may], key[may]))
        if not parts:
            return _nothing()
        return tuple(np.concatenate(one) for one in zip(*parts, strict=True))

    def _highest_keys(self) -> NDArray[np.uint64]:
        """The key below which a row is taken into a group, [n_features * n_groups]."""
        highest = np.full(len(self.exponents) * self._of.n_groups, _LAST)
        last = np.flatnonzero(_rank(self.found.group) == self._of.n_samples - 1)
        highest[self.found.group[last]] = self.found.key[last]
        return highest

    def _largest(self, values: "torch.Tensor", sequences: NDArray[np.int64]) -> "tuple[NDArray[Any], ...]":
        """Rows that may be among the largest: feature, row, group and key."""
        import torch

        of = self._of
        if not of.k:
            return _nothing()
        best, rows = largest_of_each(values, sequences)
        floor = np.full(values.shape[1], of.above, np.float32)
        last = np.flatnonzero((_rank(self.found.group) == of.k - 1) & self._is_largest(self.found.group))
        floor[self.found.group[last] // of.n_groups] = self.found.values[last]
        sequence, feature = (best > torch.from_numpy(floor)).nonzero(as_tuple=True)
        key = descending(best[sequence, feature].numpy())
        groups = feature.numpy() * of.n_groups + of.n_intervals
        return feature.numpy(), rows[sequence, feature].numpy(), groups, key

    def _is_largest(self, group: NDArray[np.int64]) -> NDArray[np.bool_]:
        is_largest: NDArray[np.bool_] = group % self._of.n_groups == self._of.n_intervals
        return is_largest

    def _windows_of(
        self, block: Block, values: NDArray[np.float32], row: NDArray[np.int64], feature: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Values around rows, [n, window]; NaN where the block has no row of that position of the sequence."""
        before, after = self._of.before, self._of.after
        sequence = block.sequences - block.sequences[0]
        # Sequences are set apart by as much as a window reaches out of them.
        stride = int(block.positions.max()) + 1 + before + after
        place = sequence * stride + block.positions + before
        row_of = np.full((int(sequence[-1]) + 1) * stride, -1, np.int64)
        row_of[place] = np.arange(len(place))
        rows = row_of[place[row][:, None] + np.arange(-before, after + 1)]
        windows: NDArray[np.float32] = values[rows, feature[:, None]]
        windows[rows < 0] = np.nan
        return windows

    def merge(self, other: Self) -> None:
        """Take the examples of rows that follow."""
        if not len(other.exponents):
            return
        exponents = np.maximum(self.exponents, other.exponents) if len(self.exponents) else other.exponents
        self._widen(exponents)
        other._widen(exponents)
        both = self.found.and_also(other.found)
        kept = self._first(both)
        self.found, self.windows = both[kept], np.concatenate([self.windows, other.windows])[kept]

    def _widen(self, exponents: NDArray[np.int32]) -> None:
        """Let intervals reach further, and keep the samples that the wider ones have."""
        if not len(self.exponents):
            self.exponents = np.full(len(exponents), NO_VALUE, np.int32)
        exponents = np.maximum(self.exponents, exponents)
        if (exponents == self.exponents).all():
            return
        self.exponents = exponents
        of, found = self._of, self.found
        feature = found.group // of.n_groups
        interval = bins_of(np.maximum(found.values, 0), exponents[feature], of.n_intervals)
        is_largest = self._is_largest(found.group)
        group = feature * of.n_groups + np.where(is_largest, of.n_intervals, interval)
        moved = Found(group, found.key, found.values, found.addresses)
        kept = self._first(moved)
        self.found, self.windows = moved[kept], self.windows[kept]

    def _first(self, examples: Found) -> NDArray[np.int64]:
        """Places of those examples that belong to the first of their groups, sorted."""
        order = np.lexsort((examples.addresses, examples.key, examples.group))
        group = examples.group[order]
        most = np.where(self._is_largest(group), self._of.k, self._of.n_samples)
        return order[_rank(group) < most]

    def arrays(self) -> Arrays:
        """All that is known."""
        return {"exponents": self.exponents, **vars(self.found), "windows": self.windows}


def _rank(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each entry in its group; groups are ascending."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def _nothing() -> "tuple[NDArray[Any], ...]":
    return tuple(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.int64, np.uint64))


def hashed(addresses: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Numbers as random as any, another one for each address: splitmix64."""
    with np.errstate(over="ignore"):
        mixed = addresses.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def descending(values: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Keys in the order of falling values; equal values, 0 and -0 among them, have equal keys."""
    bits = (values + np.float32(0)).view(np.uint32)
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (~ascending.astype(np.uint32)).astype(np.uint64)

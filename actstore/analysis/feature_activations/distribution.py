"""Reduction to the distribution of each feature: how often it is active, its extremes, its mean and a histogram."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.feature_activations.binning import NO_VALUE, bins_of, exponents_of, widened
from actstore.analysis.features import Features
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays

if TYPE_CHECKING:
    import torch

N_BINS: Final = 64
"""Bins of each sign; the largest value is in the upper half of them."""
_ENTRIES: Final = 1 << 22
"""Values that are looked at together, which bounds memory where most are not 0."""


@dataclass(frozen=True)
class Distribution:
    """Reduction to the distribution of each feature."""

    hook: str
    features: Features
    above: float = 0.0
    """A row is active where its value is larger than this."""

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook,)

    def identity(self) -> str:
        return f"distribution {self.hook} {self.above} {N_BINS} {self.features.identity()}"

    def start(self) -> "DistributionState":
        return DistributionState(self)

    def restore(self, arrays: Arrays) -> "DistributionState":
        """See `Reduction.restore`."""
        state = DistributionState(self)
        for name, shape in state.arrays().items():
            given = np.asarray(arrays[name])
            if given.ndim != shape.ndim or given.shape[2:] != shape.shape[2:]:
                raise ValueError("the state has another shape")
            setattr(state, name, given.astype(shape.dtype))
        return state

    def finish(self, state: "DistributionState") -> "DistributionState":
        """The state, which is the result."""
        return state


class DistributionState:
    """The distribution of each feature so far; no features before the first row."""

    def __init__(self, reduction: Distribution) -> None:
        self._of = reduction
        self._begin(0)

    def _begin(self, n_features: int) -> None:
        self.n_values: NDArray[np.int64] = np.zeros(n_features, np.int64)
        """Finite values of each feature, [n_features]."""
        self.n_not_finite: NDArray[np.int64] = np.zeros(n_features, np.int64)
        """Values that are NaN or infinite; nothing else counts them."""
        self.n_active: NDArray[np.int64] = np.zeros(n_features, np.int64)
        """Values that are larger than the threshold and not 0."""
        self.sums: NDArray[np.float64] = np.zeros(n_features, np.float64)
        self.largest: NDArray[np.float32] = np.full(n_features, -np.inf, np.float32)
        self.smallest: NDArray[np.float32] = np.full(n_features, np.inf, np.float32)
        self.exponents: NDArray[np.int32] = np.full((n_features, 2), NO_VALUE, np.int32)
        """Exponent of the bins of positive and of negative values."""
        self.counts: NDArray[np.int64] = np.zeros((n_features, 2, N_BINS), np.int64)
        """Values in each bin of their size, positive ones and negative ones; those that are 0 are in none."""

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        values = block.features(self._of.hook, self._of.features)
        self._expect(values.shape[1])
        self.n_values += len(values)
        largest, smallest = values, values
        # A sum is not finite if a value is not. It may also overflow, which only takes time.
        if not values.sum().isfinite():
            is_bad = ~values.isfinite()
            n_bad = is_bad.sum(0).numpy()
            self.n_not_finite += n_bad
            self.n_values -= n_bad
            largest, smallest = (values.masked_fill(is_bad, bound) for bound in (-np.inf, np.inf))
            values = values.masked_fill(is_bad, 0)
        self.largest = np.maximum(self.largest, largest.amax(0).numpy())
        self.smallest = np.minimum(self.smallest, smallest.amin(0).numpy())
        self._widen(self._needed())
        n_rows = max(1, _ENTRIES // values.shape[1])
        for start in range(0, len(values), n_rows):
            self._count(values[start : start + n_rows])

    def _needed(self) -> NDArray[np.int32]:
        """The exponents for all values so far."""
        has_values = self.n_values > 0
        extremes = np.stack([self.largest, -self.smallest], 1)
        return exponents_of(np.where(has_values[:, None], extremes, 0))

    def _count(self, values: "torch.Tensor") -> None:
        """Count finite values in their bins, which are wide enough; a value that is not finite is 0 here."""
        n_features = values.shape[1]
        flat = values.contiguous().numpy().reshape(-1)
        (places,) = np.nonzero(flat != 0)
        found, feature = flat[places], places % n_features
        self.sums += np.bincount(feature, weights=found, minlength=n_features)
        self.n_active += np.bincount(feature[found > self._of.above], minlength=n_features)
        column = feature * 2 + (found < 0)
        bins = bins_of(np.abs(found), self.exponents.reshape(-1)[column], N_BINS)
        at = column * N_BINS + bins
        counts = self.counts.reshape(-1)
        if len(at) * 8 < counts.size:  # faster than to go through all bins
            np.add.at(counts, at, 1)
        else:
            counts += np.bincount(at, minlength=counts.size)

    def merge(self, other: Self) -> None:
        """Take what is known of rows that follow."""
        if not len(other.n_values):
            return
        self._expect(len(other.n_values))
        self.n_values += other.n_values
        self.n_not_finite += other.n_not_finite
        self.n_active += other.n_active
        self.sums += other.sums
        self.largest = np.maximum(self.largest, other.largest)
        self.smallest = np.minimum(self.smallest, other.smallest)
        exponents = np.maximum(self.exponents, other.exponents)
        self._widen(exponents)
        other._widen(exponents)
        self.counts += other.counts

    def _widen(self, exponents: NDArray[np.int32]) -> None:
        exponents = np.maximum(exponents, self.exponents)
        steps = (exponents - self.exponents).reshape(-1)
        if steps.any():
            self.counts = widened(self.counts.reshape(-1, N_BINS), steps).reshape(self.counts.shape)
            self.exponents = exponents

    def _expect(self, n_features: int) -> None:
        if not len(self.n_values):
            self._begin(n_features)

    def arrays(self) -> Arrays:
        """All that is known."""
        return {
            "n_values": self.n_values,
            "n_not_finite": self.n_not_finite,
            "n_active": self.n_active,
            "sums": self.sums,
            "largest": self.largest,
            "smallest": self.smallest,
            "exponents": self.exponents,
            "counts": self.counts,
        }

"""Density, extremes, mean and histogram of features over all rows of a store."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.feature_activations.binning import widened, width_of
from actstore.analysis.feature_activations.distribution import N_BINS, Distribution, DistributionState
from actstore.analysis.features import features_of
from actstore.analysis.scanning.scan import ScanOptions, scan

if TYPE_CHECKING:
    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore


@dataclass(frozen=True)
class Histogram:
    """How often the values of a feature are in bins of equal width; values of exactly 0 are in none.

    The width is a power of two such that there are 33 to 64 bins on the side of 0 that reaches further.
    """

    counts: NDArray[np.int64]
    """Values in each bin, [n_bins]."""
    edges: NDArray[np.float64]
    """Ends of the bins, ascending, [n_bins + 1]. A bin has the end that is nearer to 0, and not the other one."""


@dataclass(frozen=True)
class FeatureStatistics:
    """How features are distributed over the rows that a scan took. Values that are not finite count nowhere else."""

    hook: str
    above: float
    """A row is active where its value is larger than this."""
    n_rows: int
    """Rows that were looked at."""
    n_values: NDArray[np.int64]
    """Finite values of each feature, [n_features]."""
    n_not_finite: NDArray[np.int64]
    """Rows that hold NaN or infinity, and values of the feature that came out so, [n_features]."""
    n_active: NDArray[np.int64]
    """Rows in which each feature is active, [n_features]."""
    density: NDArray[np.float64]
    """The fraction of rows in which it is active, [n_features]; NaN without values."""
    mean: NDArray[np.float64]
    """Mean over all rows, [n_features]; NaN without values."""
    maximum: NDArray[np.float32]
    """Largest value, [n_features]; NaN without values."""
    minimum: NDArray[np.float32]
    """Smallest value, [n_features]; NaN without values."""
    n_zero: NDArray[np.int64]
    """Values that are exactly 0, [n_features]."""
    exponents: NDArray[np.int32]
    """The bins of positive and negative values end at plus and minus two to the power of this, [n_features, 2]."""
    counts: NDArray[np.int64]
    """Values in each bin, [n_features, 2, 64]: first of positive values, then of negative ones, both away from 0."""

    def __len__(self) -> int:
        return len(self.n_values)

    def histogram(self, feature: int) -> Histogram:
        """The histogram of a feature, from its smallest value to its largest."""
        exponent = self.exponents[feature].max()
        # Bins of the side that reaches less far are put together, until they are as wide as the others.
        counts = widened(self.counts[feature], exponent - self.exponents[feature])
        positive, negative = (one[: int(np.max(np.flatnonzero(one), initial=-1)) + 1] for one in counts)
        edges = np.arange(-len(negative), len(positive) + 1) * width_of(exponent, N_BINS)
        return Histogram(np.concatenate([negative[::-1], positive]), edges)

    @classmethod
    def of(
        cls, reduction: Distribution, state: DistributionState, n_rows: int, n_bad_rows: int
    ) -> "FeatureStatistics":
        """The result of a scan.

        Args:
            reduction: what was asked for.
            state: what came out.
            n_rows: rows that were taken.
            n_bad_rows: rows that were left out since they are not finite.
        """
        n = state.n_values
        n_zero = n - state.counts.sum((1, 2))
        n_active = state.n_active + (n_zero if reduction.above < 0 else 0)
        is_there = n > 0
        each = np.where(is_there, n, 1)
        return cls(
            hook=reduction.hook,
            above=reduction.above,
            n_rows=n_rows,
            n_values=n,
            n_not_finite=state.n_not_finite + n_bad_rows,
            n_active=n_active,
            density=np.where(is_there, n_active / each, np.nan),
            mean=np.where(is_there, state.sums / each, np.nan),
            maximum=np.where(is_there, state.largest, np.nan).astype(np.float32),
            minimum=np.where(is_there, state.smallest, np.nan).astype(np.float32),
            n_zero=n_zero,
            exponents=state.exponents,
            counts=state.counts,
        )


def feature_statistics(
    store: "CommittedStore",
    hook: "HookName",
    of: Any,
    *,
    above: float = 0.0,
    **options: Unpack[ScanOptions],
) -> FeatureStatistics:
    """Density, extremes, mean and histogram of each feature over all rows, in one pass over the store.

    Args:
        store: the store.
        hook: a stored hook.
        of: directions, neurons, an SAE or a function, as for `top_activations`.
        above: a row is active where its value is larger than this.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid.
        ActstoreError: see `scan`.
    """
    array = store.array_of(hook)
    reduction = Distribution(array.name, features_of(of, array.shape), float(above))
    scanned = scan(store, {"distribution": reduction}, **options)
    return FeatureStatistics.of(
        reduction, scanned.results["distribution"], scanned.n_rows, sum(scanned.n_not_finite.values())
    )

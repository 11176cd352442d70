"""Which features are active at the same rows, exact."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.describing.finite import finite_rows
from actstore.analysis.features import Features, features_of
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.errors import JobError

if TYPE_CHECKING:
    import torch

    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

MOST_FEATURES: Final = 8192
"""Features at most: the counts of all pairs take 4 bytes each in every unit under way, and 8 in the result, which is
512 MiB for so many.
"""
_DENSE: Final = 300
"""Counting pairs one by one takes as long as so many multiplications of a matrix product."""
_ROWS: Final = 256
"""Features whose pairs are ranked together."""

By = Literal["count", "jaccard", "phi"]


@dataclass(frozen=True)
class CountPairs:
    """Reduction to the number of rows at which each pair of features is active."""

    hook: str
    features: Features
    above: float

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook,)

    def identity(self) -> str:
        return f"pairs {self.hook} {self.above} {self.features.identity()}"

    def start(self) -> "PairCounts":
        return PairCounts(self)

    def restore(self, arrays: Arrays) -> "PairCounts":
        """See `Reduction.restore`."""
        state = PairCounts(self)
        state.pairs, state.active = arrays["pairs"].copy(), arrays["active"].astype(np.int64)
        state.n_rows, state.n_not_finite = map(int, arrays["n_rows"])
        if state.pairs.shape != (len(state.active),) * 2:
            raise ValueError("the state has another shape")
        return state

    def finish(self, state: "PairCounts") -> "PairCounts":
        """The state, which is the result."""
        return state


class PairCounts:
    """How often features and pairs of them were active so far."""

    def __init__(self, reduction: CountPairs) -> None:
        self._of = reduction
        self.pairs: NDArray[np.integer[Any]] = np.zeros((0, 0), np.int32)
        """[n_features, n_features], above the diagonal; int32 for the rows of a unit, int64 for more."""
        self.active = np.zeros(0, np.int64)
        """Rows at which each feature is active, [n_features]."""
        self.n_rows = 0
        self.n_not_finite = 0
        """Rows that were left out, as a feature was NaN or infinite."""

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        values = block.features(self._of.hook, self._of.features)
        self._expect(values.shape[1])
        finite = finite_rows(values)
        if finite is not None:
            self.n_not_finite += len(values) - len(finite)
            values = values[finite]
        self.n_rows += len(values)
        is_active = values > self._of.above
        per_row = is_active.sum(1)
        self.active += is_active.sum(0).numpy()
        n = len(self.active)
        if int((per_row**2).sum()) * _DENSE > len(values) * n * n:
            product = is_active.T.float() @ is_active.float()  # whole numbers below 2^24: exact
            self.pairs += np.triu(product.numpy(), 1).astype(self.pairs.dtype)
        else:
            _add_pairs(self.pairs, is_active)

    def merge(self, other: Self) -> None:
        """Take the counts of rows that follow."""
        self.n_not_finite += other.n_not_finite
        if not len(other.active):
            return
        self._expect(len(other.active))
        self.pairs = self.pairs.astype(np.int64, copy=False)
        self.pairs += other.pairs
        self.active += other.active
        self.n_rows += other.n_rows

    def arrays(self) -> Arrays:
        """All that is known."""
        return {
            "pairs": self.pairs,
            "active": self.active,
            "n_rows": np.array([self.n_rows, self.n_not_finite]),
        }

    def _expect(self, n_features: int) -> None:
        if not len(self.active):
            check_number(n_features)
            self.active = np.zeros(n_features, np.int64)
            self.pairs = np.zeros((n_features, n_features), np.int32)


def check_number(n_features: int) -> None:
    """
    Raises:
        JobError: there are too many features for a count of every pair.
    """
    if n_features > MOST_FEATURES:
        raise JobError(
            f"there are {n_features:,} features, and the counts of all their pairs would take "
            f"{8 * n_features**2 / 2**30:,.1f} GiB; choose {MOST_FEATURES:,} at most, such as those that are active "
            "most often"
        )


def _add_pairs(counts: NDArray[np.integer[Any]], is_active: "torch.Tensor") -> None:
    """Count the pairs of active features of each row, [n_rows, n_features], above the diagonal."""
    import torch

    flat = torch.from_numpy(counts).view(-1)
    one = torch.ones(1, dtype=flat.dtype)
    row, feature = (index.numpy() for index in is_active.nonzero(as_tuple=True))
    for apart in range(1, len(counts)):
        # Pairs of features that are so many places apart in the list of active ones of their row.
        (first,) = np.nonzero(row[apart:] == row[:-apart])
        if not len(first):
            return
        pair = torch.from_numpy(feature[first] * len(counts) + feature[first + apart])
        flat.scatter_add_(0, pair, one.expand(len(pair)))


@dataclass(frozen=True)
class PairTable:
    """Some pairs of features, the strongest first; every array has one entry for each pair."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    """The two features, ``left < right``."""
    counts: NDArray[np.int64]
    """Rows at which both are active."""
    jaccard: NDArray[np.float64]
    """Rows at which both are active, as a share of those at which at least one is."""
    phi: NDArray[np.float64]
    """Correlation of being active, -1 to 1; 0 for a feature that is always active, or never."""

    def __len__(self) -> int:
        return len(self.left)


@dataclass(frozen=True)
class CoOccurrence:
    """How often features, and pairs of them, are active."""

    hook: str
    active: NDArray[np.int64]
    """Rows at which each feature is active, [n_features]."""
    pairs: NDArray[np.int64] = field(repr=False)
    """Rows at which both features of a pair are active, [n_features, n_features], above the diagonal."""
    n_rows: int
    """Number of rows that were looked at."""
    n_not_finite: int
    """Rows that were left out, since they hold NaN or infinity, or a feature of theirs is not finite."""

    def __len__(self) -> int:
        return len(self.active)

    def count(self, left: int, right: int) -> int:
        """Rows at which two features are active."""
        if left == right:
            return int(self.active[left])
        return int(self.pairs[min(left, right), max(left, right)])

    def top(self, n: int = 100, *, by: By = "count", min_count: int = 1) -> PairTable:
        """The strongest pairs; of equal ones, those with the lowest numbers.

        Args:
            n: the most pairs.
            by: what is compared: the count of common rows, or their Jaccard index, or the correlation phi.
            min_count: common rows that a pair must have: few make a large index by chance.

        Raises:
            JobError: an argument is not valid.
        """
        if by not in ("count", "jaccard", "phi"):
            raise JobError(f"by is {by!r}; it can be count, jaccard or phi")
        if n < 1 or min_count < 1:
            raise JobError(f"n is {n} and min_count is {min_count}; both must be 1 or more")
        kept: list[NDArray[np.int64]] = []
        scores: list[NDArray[np.float64]] = []
        floor = -math.inf
        for start in range(0, len(self), _ROWS):
            left, right = np.nonzero(self.pairs[start : start + _ROWS] >= min_count)
            left += start
            score = self._scores(left, right)[by]
            (best,) = np.nonzero(score >= floor)
            kept.append(np.stack([left, right])[:, best])
            scores.append(score[best])
            if sum(map(len, scores)) > 2 * n:
                joined, score = np.concatenate(kept, axis=1), np.concatenate(scores)
                order = np.argsort(-score, kind="stable")[:n]
                kept, scores, floor = [joined[:, order]], [score[order]], float(score[order[-1]])
        joined, score = np.concatenate(kept, axis=1), np.concatenate(scores)
        left, right = joined[:, np.argsort(-score, kind="stable")[:n]]
        found = self._scores(left, right)
        return PairTable(left, right, self.pairs[left, right], found["jaccard"], found["phi"])

    def _scores(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        both = self.pairs[left, right].astype(np.float64)
        a, b = self.active[left].astype(np.float64), self.active[right].astype(np.float64)
        spread = np.sqrt(a * (self.n_rows - a)) * np.sqrt(b * (self.n_rows - b))
        with np.errstate(invalid="ignore", divide="ignore"):
            phi = np.where(spread > 0, (self.n_rows * both - a * b) / spread, 0.0)
            return {"count": both, "jaccard": both / (a + b - both), "phi": phi}


def co_occurrence(
    store: "CommittedStore",
    hook: "HookName",
    of: Any,
    *,
    above: float | None = None,
    **options: Unpack[ScanOptions],
) -> CoOccurrence:
    """Count the rows at which each pair of features is active: exact, in one pass over the store.

    Args:
        store: the store.
        hook: a stored hook.
        of: features, as for `top_activations`; at most 8,192.
        above: a feature is active where its value is larger than this. None is 0, for SAEs only.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid, or there are too many features.
        ActstoreError: see `scan`.
    """
    array = store.array_of(hook)
    features = features_of(of, array.shape)
    if above is None and not features.is_sparse:
        raise JobError("only latents of an SAE have a value, 0, at which they are not active; give above=")
    reduction = CountPairs(array.name, features, 0.0 if above is None else above)
    scanned = scan(store, {"pairs": reduction}, **options)
    counts: PairCounts = scanned.results["pairs"]
    return CoOccurrence(
        hook=array.name,
        active=counts.active,
        pairs=counts.pairs.astype(np.int64, copy=False),
        n_rows=counts.n_rows,
        n_not_finite=sum(scanned.n_not_finite.values()) + counts.n_not_finite,
    )

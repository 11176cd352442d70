"""Examples of where features are active: the largest rows, and samples from intervals of their values."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.feature_activations.binning import width_of
from actstore.analysis.feature_activations.examples import Examples, ExamplesState
from actstore.analysis.features import features_of
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.errors import JobError

if TYPE_CHECKING:
    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore


@dataclass(frozen=True)
class ActivationExamples:
    """Examples of each feature, all in one table: first of feature 0, its largest rows and then its intervals from the
    highest to the lowest, then of feature 1, and so on.
    """

    hook: str
    n_features: int
    features: NDArray[np.int64]
    """Number of the feature, as in its statistics, [n_examples]."""
    intervals: NDArray[np.int64]
    """Number of the interval that the row was drawn from, 0 for the lowest; -1 for the largest rows, [n_examples]."""
    values: NDArray[np.float32]
    """[n_examples]; descending among the largest rows of a feature."""
    sequences: NDArray[np.int64]
    positions: NDArray[np.int64]
    """Where the row is, [n_examples]."""
    windows: NDArray[np.float32]
    """Values of the feature before the row, at it, and after it, [n_examples, before + 1 + after]. NaN where the
    sequence has no such position, or its row was left out of the scan.
    """
    before: int
    """Positions in front of the row."""
    n_intervals: int
    widths: NDArray[np.float64]
    """Width of an interval of each feature, a power of two, [n_features]; 0 if no value is above 0."""
    starts: NDArray[np.int64] = field(repr=False)
    """Where the examples of each feature begin, [n_features + 1]."""

    def __len__(self) -> int:
        return len(self.features)

    def of(self, feature: int) -> range:
        """The places of the examples of a feature."""
        return range(int(self.starts[feature]), int(self.starts[feature + 1]))

    @classmethod
    def made(cls, store: "CommittedStore", reduction: Examples, state: ExamplesState) -> "ActivationExamples":
        """The result of a scan.

        Args:
            store: the store that was scanned.
            reduction: what was asked for.
            state: what came out.
        """
        feature, group = np.divmod(state.found.group, reduction.n_groups)
        order = np.lexsort((-group, feature))
        found, feature, group = state.found[order], feature[order], group[order]
        sequences, entries = np.divmod(found.addresses, store.shape[1])
        n_features = len(state.exponents)
        return cls(
            hook=reduction.hook,
            n_features=n_features,
            features=feature,
            intervals=np.where(group == reduction.n_intervals, -1, group),
            values=found.values,
            sequences=sequences,
            positions=store.entries.positions_at(sequences, entries),
            windows=state.windows[order],
            before=reduction.before,
            n_intervals=reduction.n_intervals,
            widths=width_of(state.exponents, reduction.n_intervals),
            starts=np.searchsorted(feature, np.arange(n_features + 1)),
        )


def examples_of(
    store: "CommittedStore",
    hook: "HookName",
    of: Any,
    k: int,
    n_intervals: int,
    n_samples: int,
    window: tuple[int, int],
    above: float | None,
    seed: int,
) -> Examples:
    """The reduction for what a user asks for; arguments are those of `activation_examples`.

    Raises:
        JobError: an argument is not valid.
    """
    for name, value in {"k": k, "n_samples": n_samples, "before": window[0], "after": window[1]}.items():
        if value < 0:
            raise JobError(f"{name} is {value}; it must be 0 or more")
    if n_intervals < 1 or n_intervals & (n_intervals - 1) or n_intervals > 1 << 10:
        raise JobError(f"n_intervals is {n_intervals}; it must be a power of two, from 1 to 1024")
    array = store.array_of(hook)
    features = features_of(of, array.shape)
    if above is None:
        above = 0.0 if features.is_sparse else -math.inf
    return Examples(array.name, features, k, n_intervals, n_samples, *window, float(above), seed)


def activation_examples(
    store: "CommittedStore",
    hook: "HookName",
    of: Any,
    k: int = 20,
    *,
    n_intervals: int = 16,
    n_samples: int = 5,
    before: int = 20,
    after: int = 10,
    above: float | None = None,
    seed: int = 0,
    **options: Unpack[ScanOptions],
) -> ActivationExamples:
    """Find examples of each feature with the values around them, in one pass over the store.

    These are the rows with the largest values, one of each sequence, and samples from intervals of equal width between
    0 and the largest value. The width is the power of two with which more than half of the intervals, and at most all
    of them, are below the largest value. Samples are the rows whose hashed addresses are lowest, so they are the same
    in every scan of the same rows.

    Args:
        store: the store.
        hook: a stored hook.
        of: directions, neurons, an SAE or a function, as for `top_activations`.
        k: largest rows of each feature.
        n_intervals: intervals, a power of two.
        n_samples: rows from each interval; where there are fewer, all.
        before, after: positions around each row whose values are kept. Memory and what ``resume`` keeps grow with
            this: 4 bytes a position, example and feature.
        above: the largest rows are larger than this. None takes any value, or those above 0 of an SAE.
        seed: another one gives other samples.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid.
        ActstoreError: see `scan`.
    """
    reduction = examples_of(store, hook, of, k, n_intervals, n_samples, (before, after), above, seed)
    scanned = scan(store, {"examples": reduction}, **options)
    return ActivationExamples.made(store, reduction, scanned.results["examples"])

"""Metrics on held-out rows, with intervals from resampled documents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]
_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure, and where 95 % of the figures of resampled documents are."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False)
class Resampled:
    """Documents drawn with replacement, the same for all hooks, so that hooks can be compared."""

    group_of_row: NDArray[np.int64]
    """Number of the document of each row, from 0 on, [n_rows]."""
    counts: NDArray[np.int32]
    """How often each document was drawn, [n_draws, n_documents]."""

    @classmethod
    def of(cls, groups: NDArray[np.int32], n_draws: int, seed: int) -> "Resampled":
        """Draw documents.

        Args:
            groups: document of each row.
            n_draws: how often as many documents are drawn as there are.
            seed: decides which.
        """
        names, numbers = np.unique(groups, return_inverse=True)
        n = len(names)
        random = np.random.default_rng([seed, 1])
        counts = (
            np.stack(
                [
                    np.bincount(random.integers(n, size=n), minlength=n).astype(np.int32)
                    for _ in range(n_draws)
                ]
            )
            if n_draws
            else np.zeros((0, n), np.int32)
        )
        return cls(numbers, counts)

    def by_document(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums of [n_rows] by document."""
        sums: NDArray[np.float64] = np.bincount(
            self.group_of_row, weights=values, minlength=self.counts.shape[1]
        ).astype(np.float64)
        return sums

    def mean(self, values: NDArray[np.float64]) -> Interval:
        """The mean over the rows."""
        sums, sizes = self.by_document(values), self.by_document(np.ones(len(values)))
        return _interval(values.mean(), (self.counts @ sums) / (self.counts @ sizes))

    def interval(self, metric: Callable[[Weights], float]) -> Interval:
        """Any metric of weighted rows."""
        value = metric(np.ones(len(self.group_of_row)))
        draws = [metric(drawn[self.group_of_row].astype(np.float64)) for drawn in self.counts]
        return _interval(value, np.array(draws))

    def r2(self, truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> Interval:
        """The share of the variance that is explained."""
        errors, ones = self.by_document(np.square(truth - predicted)), self.by_document(np.ones(len(truth)))
        # Around the mean of all, so that the variance of a draw is not a small difference of large numbers.
        centred = truth - truth.mean()
        sums, squares = self.by_document(centred), self.by_document(np.square(centred))
        drawn = self.counts.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = drawn @ squares - np.square(drawn @ sums) / (drawn @ ones)
            return _interval(1 - errors.sum() / squares.sum(), 1 - (drawn @ errors) / spread)


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    # A draw may hold one class alone, and then has no AUC.
    there = draws[np.isfinite(draws)]
    if not len(there):
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(there, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def auc_of(scores: NDArray[np.float64], is_second: NDArray[np.bool_]) -> Callable[[Weights], float]:
    """A function that gives the area under the ROC curve of weighted rows; ties count half.

    Args:
        scores: [n_rows].
        is_second: whether a row is of the second class, [n_rows].
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    has_ties = len(ends) < len(ordered)
    second = is_second[order]

    def auc(weights: Weights) -> float:
        ranked = weights[order]
        of_second = np.where(second, ranked, 0.0)
        of_first = ranked - of_second
        below = np.cumsum(of_first)
        if has_ties:
            until = below[ends]
            before = np.concatenate([[0.0], until[:-1]])
            pairs = (
                np.diff(np.concatenate([[0.0], np.cumsum(of_second)[ends]])) * (until + before) / 2
            ).sum()
        else:
            pairs = of_second @ below
        total = of_second.sum() * below[-1]
        return float(pairs / total) if total else float("nan")

    return auc


def metrics_of_classes(
    scores: NDArray[np.float64], y: NDArray[np.int32], resampled: Resampled, *, has_chances: bool
) -> Mapping[str, Interval]:
    """Accuracy, and AUC of two classes; log loss where scores give probabilities.

    Args:
        scores: [n_rows, n_outputs], where one output means two classes.
        y: number of the class, [n_rows].
        resampled: draws of the documents.
        has_chances: whether scores are log odds.
    """
    import torch

    from actstore.analysis.probes.rows.passes import log_losses

    losses, _, is_correct = log_losses(
        torch.from_numpy(np.ascontiguousarray(scores.T))[None], torch.from_numpy(y.astype(np.int64))
    )
    metrics = {"accuracy": resampled.mean(is_correct[0].double().numpy())}
    if scores.shape[1] == 1:
        metrics["auc"] = resampled.interval(auc_of(scores[:, 0], y == 1))
    if has_chances:
        metrics["log_loss"] = resampled.mean(losses[0].numpy())
    return metrics


def metrics_of_numbers(
    predicted: NDArray[np.float64], truth: NDArray[np.float64], resampled: Resampled
) -> Mapping[str, Interval]:
    """R2 and mean squared error."""
    return {"r2": resampled.r2(truth, predicted), "mse": resampled.mean(np.square(truth - predicted))}

"""Metrics of weighted rows are those of scikit-learn, and intervals those of resampled documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from sklearn.metrics import r2_score, roc_auc_score

from actstore.analysis.probes.metrics import Resampled, auc_of, metrics_of_classes, metrics_of_numbers


@given(
    arrays.arrays(np.float64, 12, elements=st.integers(-3, 3)),
    arrays.arrays(np.int64, 12, elements=st.integers(0, 3)),
    arrays.arrays(np.bool_, 12),
)
def test_auc_of_weighted_rows_with_ties(scores: object, weights: object, is_second: object) -> None:
    """A weight is a number of equal rows."""
    scores, weights, is_second = np.asarray(scores), np.asarray(weights), np.asarray(is_second)
    found = auc_of(scores, is_second)(weights.astype(np.float64))
    truth = np.repeat(is_second, weights)
    if len(set(truth.tolist())) < 2:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(roc_auc_score(truth, np.repeat(scores, weights)))


def documents(seed: int = 0) -> tuple[np.random.Generator, NDArray[np.int32]]:
    random = np.random.default_rng(seed)
    return random, np.sort(random.integers(0, 40, 300)).astype(np.int32)


def test_intervals_are_of_resampled_documents() -> None:
    """Computed again document by document."""
    random, groups = documents()
    y = (random.random(300) < 0.4).astype(np.int32)
    scores = (y + random.standard_normal(300))[:, None]
    resampled = Resampled.of(groups, 60, 3)
    metrics = metrics_of_classes(scores, y, resampled, has_chances=True)
    names = np.unique(groups)
    draws: dict[str, list[float]] = {"accuracy": [], "auc": []}
    for counts in resampled.counts:
        assert counts.sum() == len(names)
        rows = np.concatenate(
            [np.flatnonzero(groups == name) for name, n in zip(names, counts, strict=True) for _ in range(n)]
        )
        draws["accuracy"].append(float(((scores[rows, 0] > 0) == (y[rows] == 1)).mean()))
        draws["auc"].append(float(roc_auc_score(y[rows], scores[rows, 0])))
    for name, values in draws.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert (metrics[name].low, metrics[name].high) == pytest.approx((low, high))


def test_documents_of_many_rows_make_wide_intervals() -> None:
    """Rows of a document that are all right or all wrong say no more than one row."""
    random = np.random.default_rng(0)
    right = random.random(30) < 0.7
    y = np.repeat(right, 50).astype(np.int32)
    scores, groups = np.ones((1500, 1)), np.repeat(np.arange(30), 50).astype(np.int32)
    by_document = metrics_of_classes(scores, y, Resampled.of(groups, 500, 0), has_chances=True)["accuracy"]
    by_row = metrics_of_classes(
        scores, y, Resampled.of(np.arange(1500, dtype=np.int32), 500, 0), has_chances=True
    )["accuracy"]
    assert by_document.value == by_row.value == right.mean()
    assert by_document.high - by_document.low > 4 * (by_row.high - by_row.low)


def test_metrics_of_numbers() -> None:
    random, groups = documents()
    truth = random.standard_normal(300) + 1e3
    predicted = truth + random.standard_normal(300) * 0.5
    resampled = Resampled.of(groups, 50, 0)
    metrics = metrics_of_numbers(predicted, truth, resampled)
    assert metrics["r2"].value == pytest.approx(r2_score(truth, predicted))
    weights = [counts[resampled.group_of_row] for counts in resampled.counts]
    draws = [r2_score(truth, predicted, sample_weight=one) for one in weights]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (metrics["r2"].low, metrics["r2"].high) == pytest.approx((low, high))


def test_no_resamples_no_interval() -> None:
    _, groups = documents()
    one = metrics_of_numbers(np.ones(300), np.arange(300.0), Resampled.of(groups, 0, 0))["r2"]
    assert np.isnan([one.low, one.high]).all()

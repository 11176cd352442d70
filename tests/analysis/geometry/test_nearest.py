"""Nearest rows against a stable sort of all figures in NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actstore import analysis
from actstore.analysis.geometry.nearest import Metric
from actstore.errors import JobError
from actstore.facade import Store
from tests.analysis.stores import HOOK, D, store_of
from tests.store.example import HOOKS

METRICS: tuple[Metric, ...] = ("cosine", "dot", "euclidean")


def expected(values: Any, vectors: Any, metric: str) -> NDArray[np.float64]:
    """The figure of each row and vector, [n_rows, n_vectors]."""
    rows = values.reshape(-1, vectors.shape[-1]).astype(np.float64)
    figures: NDArray[np.float64] = rows @ vectors.T
    if metric == "cosine":
        figures /= np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    if metric == "euclidean":
        figures = np.linalg.norm(rows[:, None] - vectors, axis=2)
    return figures


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("metric", METRICS)
def test_same_as_a_sort_of_all_rows(metric: Metric, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    # Far from the origin, where squared distances in float32 would have no digit left.
    values = (random.standard_normal((120, 8, D)) + 1000).astype(np.float32)
    vectors = random.standard_normal((4, D)) + 1000
    store = store_of(tmp_path, values)
    near = analysis.nearest(store, HOOK, torch.from_numpy(vectors), 9, metric=metric, seqpos=slice(1, None))
    figures = expected(values[:, 1:], vectors, metric)
    order = np.argsort(figures if metric == "euclidean" else -figures, axis=0, kind="stable")[:9].T
    sequences, positions = np.divmod(order, 7)
    np.testing.assert_array_equal(near.sequences, sequences)
    np.testing.assert_array_equal(near.positions, positions + 1)
    np.testing.assert_allclose(near.values, np.take_along_axis(figures.T, order, 1), rtol=1e-6)
    assert near.metric == metric


def test_a_stored_row_is_nearest_to_itself(real_store: Store) -> None:
    row = real_store["blocks.1.attn.hook_z"][5, 3]
    near = analysis.nearest(real_store, ("z", 1), row, 3, metric="euclidean")
    assert (near.sequences[0, 0], near.positions[0, 0], near.values[0, 0]) == (5, 3, 0)
    assert near.context(0, 0).tokens[near.context(0, 0).at] == real_store.str_tokens(5)[3]
    assert repr(near).startswith("<Nearest blocks.1.attn.hook_z: 3 of ")
    assert "5:3" in near._repr_html_()


def test_rows_of_zeros_have_no_angle(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((20, 8, D)).astype(np.float32)
    values[4, 2] = 0
    near = analysis.nearest(store_of(tmp_path, values), HOOK, np.ones(D), 160)
    assert near.n_not_finite == 1
    assert (4, 2) not in set(zip(near.sequences[0], near.positions[0], strict=True))
    assert np.isfinite(near.values[0, :159]).all()
    assert np.isnan(near.values[0, 159])


@pytest.mark.usefixtures("small_units")
def test_interrupted_search_goes_on(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((60, 8, D)).astype(np.float32)
    store = store_of(tmp_path / "store", values)
    folder = str(tmp_path / "kept")
    whole = analysis.nearest(store, HOOK, values[3], 4, resume=folder)
    again = analysis.nearest(store, HOOK, values[3], 4, resume=folder)
    assert whole.values.tobytes() == again.values.tobytes()
    other = analysis.nearest(store, HOOK, values[3], 4, metric="dot", resume=folder)
    assert other.values[0, 0] > 1, "what is kept of another metric is not taken"


@pytest.mark.parametrize(
    ("vectors", "metric", "says"),
    [
        (np.zeros((2, D)), "cosine", "a vector is 0"),
        (np.ones((2, D + 1)), "dot", r"shape \[2, 17\]; give one of \[16\]"),
        (np.ones((0, D)), "dot", r"shape \[0, 16\]"),
        (np.full(D, np.nan), "dot", "NaN or infinity"),
        (np.ones(D), "manhattan", "it can be cosine, dot, euclidean"),
    ],
    ids=["zero", "width", "none", "nan", "metric"],
)
def test_vectors_that_do_not_fit(vectors: Any, metric: Any, says: str, tmp_path: Path) -> None:
    store = store_of(tmp_path, np.zeros((10, 8, D), np.float32))
    with pytest.raises(JobError, match=says):
        analysis.nearest(store, HOOK, vectors, metric=metric)


def test_vectors_have_the_axes_of_the_hook(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.zeros((10, 8, D), np.float32))
    assert analysis.nearest(store, HOOKS[2], np.ones((3, 2, D // 2)), 2, metric="dot").values.shape == (3, 2)
    with pytest.raises(JobError, match=r"give one of \[2, 8\]"):
        analysis.nearest(store, HOOKS[2], np.ones((3, D)), 2)

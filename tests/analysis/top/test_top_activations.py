"""Top activations against a stable sort of all values in NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import actstore
from actstore.analysis import scanning
from actstore.analysis.top.top_activations import top_activations
from actstore.errors import JobError
from actstore.storage.local import LocalBlobs
from tests.analysis.stores import HOOK, D, store_of
from tests.store.slots import ragged, ragged_plan, write_ragged

Values = NDArray[np.float32]


def expected(values: Values, k: int, per: str, taken: NDArray[np.bool_]) -> tuple[Values, NDArray[np.int64]]:
    """The k largest of each column of [n_sequences, 8, n], and their addresses; the first of equals first."""
    flat = np.where(taken[..., None], values, -np.inf).reshape(-1, values.shape[-1])
    if per == "sequence":
        best = flat.reshape(len(values), 8, -1)
        keep = best.argmax(1)
        masked = np.full_like(best, -np.inf)
        np.put_along_axis(masked, keep[:, None], np.take_along_axis(best, keep[:, None], 1), 1)
        flat = masked.reshape(flat.shape)
    order = np.argsort(-flat, axis=0, kind="stable")[:k].T
    found = np.take_along_axis(flat.T, order, 1)
    there = np.isfinite(found)
    found, order = np.where(there, found, np.nan), np.where(there, order, -1)
    missing = ((0, 0), (0, k - found.shape[1]))
    return np.pad(found, missing, constant_values=np.nan), np.pad(order, missing, constant_values=-1)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_same_as_a_stable_sort(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n = data.draw(st.integers(1, 60))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Few different values, so that many are equal.
    values = random.integers(-3, 4, (n, 8, D)).astype(np.float32)
    neurons = data.draw(st.lists(st.integers(0, D - 1), min_size=1, max_size=4, unique=True))
    k = data.draw(st.integers(1, 12))
    per: Any = data.draw(st.sampled_from(["row", "sequence"]))
    seqpos = data.draw(st.sampled_from([None, slice(1, None), [0, 5]]))
    chosen = random.random(n) < 0.7
    chosen[random.integers(n)] = True
    taken = np.zeros((n, 8), bool)
    taken[:, seqpos if seqpos is not None else slice(None)] = True
    taken &= chosen[:, None]
    store = store_of(tmp_path_factory.mktemp("top"), values)
    top = top_activations(store, HOOK, neurons, k, per=per, seqpos=seqpos, sequences=chosen)
    found, addresses = expected(values[..., neurons], k, per, taken)
    np.testing.assert_array_equal(top.values, found)
    np.testing.assert_array_equal(
        np.where(top.sequences < 0, -1, top.sequences * 8 + top.positions), addresses
    )
    assert top.n_rows == taken.sum()


def test_rows_of_chosen_positions_are_those_that_were_written(tmp_path: Path) -> None:
    """Their arrays are narrower than their sequences: values, positions and documents must be of the same tokens."""
    chosen = [[0, 4], [], [1, 2, 7], [2], [0, 2, 4], [7]]
    text = ragged([5, 1, 8, 3, 6, 8], chosen, 8)
    blobs = LocalBlobs(tmp_path)
    write_ragged(blobs, text, ragged_plan(text, is_chosen=True))
    store = actstore.open(blobs.url)
    values = text.values[HOOK].reshape(6, 8, -1)[..., :3]
    for seqpos, sequences in ((None, None), ([2, 4, 7], None), (slice(1, None), [0, 2])):
        taken = np.zeros((6, 8), bool)
        for i, row in enumerate(chosen):
            taken[i, row] = True
        allowed = np.zeros((6, 8), bool)
        allowed[:, slice(None) if seqpos is None else seqpos] = True
        taken &= allowed
        if sequences is not None:
            taken[[i for i in range(6) if i not in sequences]] = False
        top = top_activations(store, HOOK, [0, 1, 2], 4, seqpos=seqpos, sequences=sequences)
        found, addresses = expected(values, 4, "row", taken)
        np.testing.assert_array_equal(top.values, found)
        np.testing.assert_array_equal(
            np.where(top.sequences < 0, -1, top.sequences * 8 + top.positions), addresses
        )
        np.testing.assert_array_equal(top.documents, top.sequences, "each sequence is one document")
        assert top.n_rows == taken.sum()


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks and units, so that a small store has many."""
    monkeypatch.setattr(scanning.unit, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(scanning.unit, "_UNIT_ROWS", 64)


@pytest.mark.usefixtures("many")
def test_directions_over_many_units(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((203, 8, D)).astype(np.float32)
    directions = random.standard_normal((5, D)).astype(np.float32)
    store = store_of(tmp_path, values)
    for per in ("row", "sequence"):
        top = top_activations(store, HOOK, torch.from_numpy(directions), 7, per=per)
        found, addresses = expected(values @ directions.T, 7, per, np.ones((203, 8), bool))
        np.testing.assert_array_equal(top.sequences * 8 + top.positions, addresses)
        np.testing.assert_allclose(top.values, found, rtol=1e-5)


@pytest.mark.usefixtures("many")
def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    values = random.standard_normal((90, 8, D)).astype(np.float32)
    bad = random.random((90, 8)) < 0.1
    values[bad, random.integers(0, D, bad.sum())] = random.choice([np.nan, np.inf, -np.inf], bad.sum())
    store = store_of(tmp_path, values)
    top = top_activations(store, HOOK, [3, 7], 5)
    found, addresses = expected(values[..., [3, 7]], 5, "row", ~bad)
    np.testing.assert_array_equal(top.values, found)
    np.testing.assert_array_equal(top.sequences * 8 + top.positions, addresses)
    assert top.n_not_finite == bad.sum()
    assert top.n_rows == (~bad).sum()


def test_nan_of_a_function_is_counted(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((40, 8, D)).astype(np.float32)
    store = store_of(tmp_path, values)
    top = top_activations(store, HOOK, lambda rows: rows[:, :2].sqrt(), 5)
    roots = np.sqrt(np.maximum(values[..., :2], 0))
    found, addresses = expected(roots, 5, "row", (values[..., 0] >= 0))
    np.testing.assert_array_equal(top.sequences[0] * 8 + top.positions[0], addresses[0])
    np.testing.assert_allclose(top.values[0], found[0], rtol=1e-6)
    assert top.n_not_finite == (values[..., :2] < 0).sum()


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ([0, D], "the hook has 16 elements"),
        (np.zeros((2, D + 1), np.float32), r"give directions \[n, 16\]"),
        (np.zeros((0, D), np.float32), r"give directions \[n, 16\]"),
        ("features", r"give directions \[n, 16\]"),
        (lambda rows: rows.sum(), r"must give a tensor \[n_rows, n_features\]"),
    ],
    ids=["neuron", "width", "none", "text", "function"],
)
def test_features_that_do_not_fit(of: Any, says: str, tmp_path: Path) -> None:
    store = store_of(tmp_path, np.zeros((10, 8, D), np.float32))
    with pytest.raises(JobError, match=says):
        top_activations(store, HOOK, of)

"""Rows by quantile: a fair sample of the active rows, and the same one however the work is divided."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.analysis import top_activations
from actstore.analysis.scanning import unit as unit_module
from actstore.analysis.top.sampled_rows import numbers_of
from actstore.errors import JobError
from actstore.facade import Store
from tests.analysis.stores import HOOK, D, store_of


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 64)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_sample_is_that_of_all_rows_at_once(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n = data.draw(st.integers(1, 50))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = random.integers(-4, 5, (n, 8, D)).astype(np.float32)
    neurons = data.draw(st.lists(st.integers(0, D - 1), min_size=1, max_size=3, unique=True))
    above = data.draw(st.sampled_from([None, 0.0, 3.0, 9.0]))
    k, parts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    store = store_of(tmp_path_factory.mktemp("sample"), values)
    top = top_activations(store, HOOK, neurons, k, above=above, by_quantile=parts)
    for feature, neuron in enumerate(neurons):
        flat = values[..., neuron].reshape(-1)
        (active,) = np.nonzero(flat > (-np.inf if above is None else above))
        drawn = active[np.argsort(numbers_of(active))[::-1][: k * parts]]
        drawn = drawn[np.lexsort((drawn, -flat[drawn]))]
        m = len(drawn)
        assert (top.sequences[feature, :m] * 8 + top.positions[feature, :m]).tolist() == drawn.tolist()
        np.testing.assert_array_equal(top.values[feature, :m], flat[drawn])
        assert top.quantiles is not None
        assert top.quantiles[feature].tolist() == [i * parts // m for i in range(m)] + [-1] * (k * parts - m)
        assert (top.sequences[feature, m:] == -1).all()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    random = np.random.default_rng(1)
    return store_of(tmp_path / "store", random.standard_normal((250, 8, D)).astype(np.float32))


def test_all_rows_are_as_likely(store: Store) -> None:
    """Among the active rows, those that are drawn lie anywhere in the order of values, and anywhere in the store."""
    values = store[HOOK][:].numpy().reshape(-1, D)
    top = top_activations(store, HOOK, list(range(D)), 40, above=0, by_quantile=4)
    deviation = 4.5 / (12 * 160) ** 0.5  # of the mean of 160 numbers between 0 and 1
    for feature in range(D):
        active = np.sort(values[:, feature][values[:, feature] > 0])
        ranks = np.searchsorted(active, top.values[feature]) / len(active)
        assert abs(ranks.mean() - 0.5) < deviation
        assert abs(top.sequences[feature].mean() / 250 - 0.5) < deviation


def test_table_names_the_quantile(store: Store) -> None:
    top = top_activations(store, HOOK, [0], 3, above=0, by_quantile=2)
    assert top.to_arrow(text=False)["quantile"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert "quantile" not in top_activations(store, HOOK, [0], 3).to_arrow(text=False).column_names


def test_interrupted_scan_goes_on(store: Store, tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        return top_activations(store, HOOK, [0, 4], 3, above=0, by_quantile=2, **options)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(resume=str(tmp_path / "kept"), on_progress=stop)
    again, whole = run(resume=str(tmp_path / "kept")), run()
    np.testing.assert_array_equal(again.sequences, whole.sequences)
    np.testing.assert_array_equal(again.values, whole.values)


def test_values_that_are_nan_are_counted(store: Store) -> None:
    values = store[HOOK][:].numpy().reshape(-1, D)
    top = top_activations(store, HOOK, lambda rows: rows[:, :1].sqrt(), 5, by_quantile=1)
    assert top.n_not_finite == (values[:, 0] < 0).sum()
    assert torch.from_numpy(top.values).isfinite().all()


def test_arguments_that_are_wrong(store: Store) -> None:
    for wrong in ({"by_quantile": 0}, {"by_quantile": 2, "per": "sequence"}):
        options: dict[str, Any] = wrong
        with pytest.raises(JobError, match="it must be 1 or more, for per='row'"):
            top_activations(store, HOOK, [0], 3, **options)

"""Statistics of features against NumPy over all values in memory."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore import analysis
from actstore.analysis.feature_activations.distribution import Distribution
from actstore.analysis.features import Neurons
from actstore.analysis.scanning import unit as unit_module
from tests.analysis.scanning.orders import same_bits_in_any_order
from tests.analysis.stores import HOOK, D, store_of

Values = NDArray[np.float32]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks and units, so that a small store has many."""
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 64)


def expect_same(found: analysis.FeatureStatistics, values: Values, above: float | np.float32) -> None:
    """Compare with rows [n_rows, n_features] in memory."""
    assert found.n_rows == len(values)
    np.testing.assert_array_equal(found.density, (values > above).mean(0))
    np.testing.assert_array_equal(found.n_active, (values > above).sum(0))
    np.testing.assert_array_equal(found.maximum, values.max(0))
    np.testing.assert_array_equal(found.minimum, values.min(0))
    np.testing.assert_array_equal(found.n_zero, (values == 0).sum(0))
    np.testing.assert_allclose(found.mean, values.mean(0, dtype=np.float64), rtol=1e-12, atol=1e-12)
    for feature, column in enumerate(values.T.astype(np.float64)):
        histogram = found.histogram(feature)
        expected = [
            ((column >= low) & (column < high)).sum()
            if low >= 0
            else ((column > low) & (column <= high) & (column != 0)).sum()
            for low, high in zip(histogram.edges[:-1], histogram.edges[1:], strict=True)
        ]
        if 0 in histogram.edges[:-1]:  # zeros are in no bin
            expected[histogram.edges.tolist().index(0)] -= (column == 0).sum()
        assert histogram.counts.tolist() == expected
        assert histogram.counts.sum() == (column != 0).sum()
        reach = max(-histogram.edges[0], histogram.edges[-1])
        assert len(set(np.diff(histogram.edges))) <= 1
        if column.any():
            assert 33 <= reach / np.diff(histogram.edges)[0] <= 64
            assert histogram.counts[0] or column.min() >= 0
            assert histogram.counts[-1] or column.max() <= 0
        else:
            assert reach == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_same_as_in_memory(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n = data.draw(st.integers(1, 60))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scale = data.draw(st.sampled_from([1.0, 1e-30, 1e30]))
    # Sizes over many powers of two, and many zeros.
    values = random.standard_normal((n, 8, D)) * 2.0 ** random.integers(-9, 10, (n, 8, 1)) * scale
    values *= random.random((n, 8, D)) < data.draw(st.sampled_from([0.05, 0.5, 1.0]))
    stored = values.astype(np.float32)
    neurons = data.draw(st.lists(st.integers(0, D - 1), min_size=1, max_size=4, unique=True))
    above = data.draw(st.sampled_from([0.0, 0.5 * scale, -0.5 * scale]))
    store = store_of(tmp_path_factory.mktemp("statistics"), stored, dtype="float32")
    chosen = random.random(n) < 0.7
    chosen[random.integers(n)] = True
    found = analysis.feature_statistics(store, HOOK, neurons, above=above, sequences=chosen)
    expect_same(found, stored[chosen].reshape(-1, D)[:, neurons], np.float32(above))


def test_values_at_the_ends_of_bins(tmp_path: Path) -> None:
    """A power of two is the first of its bin, and widening moves nothing across an end."""
    sizes = np.concatenate([2.0 ** np.arange(-6, 4), 3 * 2.0 ** np.arange(-6, 3)])
    random = np.random.default_rng(0)
    values = np.zeros((60, 8, D), np.float32)
    values[..., 0] = random.choice(np.concatenate([sizes, -sizes, [0]]), (60, 8))
    store = store_of(tmp_path, values)
    expect_same(analysis.feature_statistics(store, HOOK, [0]), values.reshape(-1, D)[:, [0]], 0)


def test_what_is_not_finite_counts_nowhere_else(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    values = random.standard_normal((90, 8, D)).astype(np.float32)
    bad_rows = random.random((90, 8)) < 0.1
    values[bad_rows, 3] = np.nan
    store = store_of(tmp_path, values)

    found = analysis.feature_statistics(store, HOOK, lambda rows: rows[:, :2].sqrt())
    for feature in range(2):
        kept = ~bad_rows & (values[..., feature] >= 0)
        roots = np.sqrt(values[..., feature][kept])
        assert found.n_values[feature] == kept.sum()
        assert found.n_not_finite[feature] == 90 * 8 - kept.sum()
        assert found.density[feature] == (roots > 0).mean()
        np.testing.assert_allclose(found.mean[feature], roots.mean(dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(found.maximum[feature], roots.max(), rtol=1e-6)
        assert found.histogram(feature).counts.sum() == (roots != 0).sum()
    infinite = analysis.feature_statistics(store, HOOK, lambda rows: 1 / (rows[:, :1] > 0).float())
    assert infinite.n_values[0] == (~bad_rows & (values[..., 0] > 0)).sum()
    assert (infinite.maximum[0], infinite.minimum[0], infinite.mean[0]) == (1, 1, 1)


def test_feature_without_values(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.ones((9, 8, D), np.float32))
    found = analysis.feature_statistics(store, HOOK, lambda rows: rows[:, :1] * np.nan)
    assert np.isnan([found.density[0], found.mean[0], found.maximum[0], found.minimum[0]]).all()
    assert found.histogram(0).counts.tolist() == []
    assert found.n_not_finite.tolist() == [72]


def test_resumed_and_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    scale = 2.0 ** random.integers(-4, 9, (150, 1, 1))
    values = (random.standard_normal((150, 8, D)) * scale).astype(np.float32)
    store = store_of(tmp_path / "store", values)
    same_bits_in_any_order(store, Distribution(HOOK, Neurons((0, 5, 7))), tmp_path / "kept", monkeypatch)

"""Co-occurrence of features against matrix products of all rows, in NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore.analysis import CoOccurrence, co_occurrence, scan
from actstore.analysis.describing import co_occurrence as module
from actstore.analysis.describing.co_occurrence import By, CountPairs
from actstore.analysis.features import Computed, Neurons
from actstore.analysis.scanning import unit as unit_module
from actstore.errors import JobError
from actstore.facade import Store
from tests.analysis.stores import HOOK, D, store_of


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 64)


def counted(values: NDArray[Any], above: float) -> NDArray[np.int64]:
    """Rows at which both features are active, [n, n]."""
    active = (values.reshape(-1, values.shape[-1]) > above).astype(np.int64)
    return active.T @ active


def of_pair(values: NDArray[Any], above: float, left: int, right: int) -> dict[str, float]:
    """The scores of a pair from their definitions, with the correlation of NumPy."""
    a, b = (values.reshape(-1, values.shape[-1])[:, i] > above for i in (left, right))
    phi = float(np.corrcoef(a, b)[0, 1]) if 0 < a.mean() < 1 and 0 < b.mean() < 1 else 0.0
    return {"count": float((a & b).sum()), "jaccard": float((a & b).sum() / (a | b).sum()), "phi": phi}


def check(found: CoOccurrence, values: NDArray[Any], above: float) -> None:
    expected = counted(values, above)
    np.testing.assert_array_equal(found.active, np.diag(expected))
    np.testing.assert_array_equal(found.pairs, np.triu(expected, 1))
    assert found.n_rows == values.reshape(-1, values.shape[-1]).shape[0]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_counts_are_those_of_a_product(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n = data.draw(st.integers(1, 50))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = random.standard_normal((n, 8, D)).astype(np.float32)
    above = data.draw(st.sampled_from([-9.0, 0.0, 1.0, 2.5, 9.0]))
    neurons = data.draw(st.lists(st.integers(0, D - 1), min_size=1, max_size=D, unique=True))
    found = co_occurrence(store_of(tmp_path_factory.mktemp("pairs"), values), HOOK, neurons, above=above)
    check(found, values[..., neurons], above)


@pytest.mark.parametrize("dense", [0, 10**9], ids=["product", "pairs"])
def test_both_ways_of_counting(tmp_path: Path, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DENSE", 10**9 if dense == 0 else 0)
    values = np.random.default_rng(1).standard_normal((60, 8, D)).astype(np.float32)
    check(co_occurrence(store_of(tmp_path, values), HOOK, list(range(D)), above=0.3), values, 0.3)


@pytest.mark.parametrize("by", ["count", "jaccard", "phi"])
def test_top_pairs_are_those_of_a_full_sort(tmp_path: Path, by: By, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 3)
    values = np.random.default_rng(2).integers(-2, 3, (40, 8, D)).astype(np.float32)
    values[..., 4] = values[..., 9]  # one pair is always active together
    values[..., 5] = 1  # always active
    found = co_occurrence(store_of(tmp_path, values), HOOK, list(range(D)), above=0)
    scores = {(i, j): of_pair(values, 0, i, j) for i in range(D) for j in range(i + 1, D)}
    scores = {pair: score for pair, score in scores.items() if score["count"] >= 50}
    expected = sorted(scores, key=lambda pair: (-round(scores[pair][by], 9), pair))[:12]
    table = found.top(12, by=by, min_count=50)
    assert list(zip(table.left.tolist(), table.right.tolist(), strict=True)) == expected
    for name in ("jaccard", "phi"):
        np.testing.assert_allclose(getattr(table, name), [scores[pair][name] for pair in expected], atol=1e-9)
    assert table.counts.tolist() == [scores[pair]["count"] for pair in expected]
    assert found.count(9, 4) == found.count(4, 9) == found.count(4, 4)
    if by != "count":
        assert (table.left[0], table.right[0]) == (4, 9)


def test_rows_with_features_that_are_not_finite(tmp_path: Path) -> None:
    values = np.random.default_rng(3).standard_normal((30, 8, D)).astype(np.float32)
    found = co_occurrence(store_of(tmp_path, values), HOOK, lambda rows: rows[:, :3].sqrt(), above=0.5)
    whole = values[(values[..., :3] >= 0).all(-1)][:, :3]
    check(found, np.sqrt(whole), 0.5)
    assert found.n_not_finite == 240 - len(whole)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_of(
        tmp_path / "store", np.random.default_rng(4).standard_normal((90, 8, D)).astype(np.float32)
    )


def test_interrupted_scan_goes_on(store: Store, tmp_path: Path) -> None:
    whole = co_occurrence(store, HOOK, [0, 3, 5], above=0)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        co_occurrence(store, HOOK, [0, 3, 5], above=0, resume=str(tmp_path / "kept"), on_progress=stop)
    again = co_occurrence(store, HOOK, [0, 3, 5], above=0, resume=str(tmp_path / "kept"))
    np.testing.assert_array_equal(again.pairs, whole.pairs)
    np.testing.assert_array_equal(again.active, whole.active)
    assert again.n_rows == whole.n_rows
    other = co_occurrence(store, HOOK, [0, 3, 5], above=1, resume=str(tmp_path / "kept"))
    assert other.active.sum() < whole.active.sum()


def test_features_of_two_reductions_are_computed_once(store: Store) -> None:
    calls: list[int] = []

    def features(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return rows[:, :4].float()

    of = Computed(features)
    scan(store, {"a": CountPairs(HOOK, of, 0.0), "b": CountPairs(HOOK, of, 1.0)})
    assert sum(calls) == 720


def test_arguments_that_are_wrong(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="give above="):
        co_occurrence(store, HOOK, [0, 1])
    found = co_occurrence(store, HOOK, [0, 1], above=0)
    for wrong in ({"by": "size"}, {"n": 0}, {"min_count": 0}):
        with pytest.raises(JobError, match="by is 'size'|must be 1 or more"):
            found.top(**wrong)
    monkeypatch.setattr(module, "MOST_FEATURES", 2)
    with pytest.raises(JobError, match="there are 3 features, and the counts of all their pairs"):
        co_occurrence(store, HOOK, [0, 1, 2], above=0)
    assert Neurons((0, 1)).is_sparse is False


def test_no_pair_at_all(store: Store) -> None:
    assert not len(co_occurrence(store, HOOK, [0, 1], above=1e9).top())

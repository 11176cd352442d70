"""Means and largest values by token id against NumPy over all rows at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import actstore
from actstore.analysis import ByToken, by_token
from actstore.analysis.describing import by_token as module
from actstore.analysis.scanning import unit as unit_module
from actstore.errors import JobError
from tests.analysis.stores import HOOK, SHAKESPEARE_HOOK, D, shakespeare, store_of

WRONG: Any = "sum"


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    return shakespeare(tmp_path_factory.mktemp("by-token"))


def check(found: ByToken, values: NDArray[Any], tokens: NDArray[np.int32]) -> None:
    """Compare with the rows of each token id, [n_rows, n_features] and [n_rows]."""
    assert found.token_ids.tolist() == sorted(set(tokens.tolist()))
    for i, token in enumerate(found.token_ids.tolist()):
        rows = values[tokens == token]
        assert found.counts[i] == len(rows)
        np.testing.assert_allclose(found.means[:, i], rows.mean(0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_array_equal(found.maxima[:, i], rows.max(0))


def rows_of(store: actstore.Store, hook: str) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    real = np.arange(store.shape[1]) < store.lengths[:][:, None]
    return store[hook][:].float().numpy()[real], store.tokens[:][real]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_same_as_by_hand(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n = data.draw(st.integers(1, 40))
    values = np.random.default_rng(data.draw(st.integers(0, 2**32))).standard_normal((n, 8, D))
    store = store_of(tmp_path_factory.mktemp("tokens"), values.astype(np.float32))
    seqpos = data.draw(st.sampled_from([None, [0, 1, 4], slice(2, None)]))
    neurons = data.draw(st.lists(st.integers(0, D - 1), min_size=1, max_size=4, unique=True))
    found = by_token(store, HOOK, neurons, seqpos=seqpos)
    kept = slice(None) if seqpos is None else seqpos
    rows = values.astype(np.float32)[:, kept][..., neurons].reshape(-1, len(neurons))
    check(found, rows, store.tokens[:][:, kept].reshape(-1))


def test_real_tokens_that_come_again_and_again(
    store: actstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEATURES", 3)
    values, tokens = rows_of(store, SHAKESPEARE_HOOK)
    found = by_token(store, SHAKESPEARE_HOOK, list(range(8)))
    assert found.counts.max() > 50
    check(found, values[:, :8], tokens)
    assert found.n_rows == len(values)


@pytest.mark.parametrize("by", ["mean", "max"])
def test_top_tokens_of_each_feature(store: actstore.Store, by: Any) -> None:
    found = by_token(store, SHAKESPEARE_HOOK, [3, 5])
    top = found.top(4, by=by, min_count=6)
    often = found.counts >= 6
    numbers = {"mean": found.means, "max": found.maxima}[by][:, often]
    order = np.argsort(-numbers, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(top.token_ids, found.token_ids[often][order])
    np.testing.assert_array_equal(top.values, np.take_along_axis(numbers, order, 1))
    assert found.text(int(top.token_ids[0, 0])) == store.tokenizer.decode([int(top.token_ids[0, 0])])
    missing = found.top(4, min_count=10**6)
    assert (missing.token_ids == -1).all()
    assert np.isnan(missing.values).all()


def test_only_some_token_ids(store: actstore.Store) -> None:
    values, tokens = rows_of(store, SHAKESPEARE_HOOK)
    chosen = np.unique(tokens)[[1, 7, 20]]
    found = by_token(store, SHAKESPEARE_HOOK, [0], tokens=[*chosen.tolist(), 10**6])
    is_chosen = np.isin(tokens, chosen)
    check(found, values[is_chosen][:, :1], tokens[is_chosen])


def test_interrupted_scan_ends_in_the_same_bits(store: actstore.Store, tmp_path: Path) -> None:
    def run(**options: Any) -> ByToken:
        return by_token(store, SHAKESPEARE_HOOK, [0, 9], **options)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(resume=str(tmp_path), on_progress=stop)
    again, whole = run(resume=str(tmp_path)), run()
    for name in ("token_ids", "counts", "means", "maxima"):
        assert getattr(again, name).tobytes() == getattr(whole, name).tobytes()


def test_rows_with_features_that_are_not_finite(store: actstore.Store) -> None:
    values, tokens = rows_of(store, SHAKESPEARE_HOOK)
    found = by_token(store, SHAKESPEARE_HOOK, lambda rows: rows[:, :2].sqrt())
    kept = (values[:, :2] >= 0).all(1)
    check(found, torch.from_numpy(values[:, :2][kept]).sqrt().numpy(), tokens[kept])
    assert found.n_not_finite == (~kept).sum()


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda store: by_token(store, SHAKESPEARE_HOOK, [0], tokens=[]), "give a list of token ids"),
        (lambda store: by_token(store, SHAKESPEARE_HOOK, [0], tokens=WRONG), "give a list of token ids"),
        (lambda store: by_token(store, SHAKESPEARE_HOOK, [0]).top(by=WRONG), "by is 'sum'"),
        (lambda store: by_token(store, SHAKESPEARE_HOOK, [0]).top(0), "k is 0"),
    ],
    ids=["no tokens", "text", "by", "k"],
)
def test_arguments_that_are_wrong(
    store: actstore.Store, act: Callable[[actstore.Store], Any], says: str
) -> None:
    with pytest.raises(JobError, match=says):
        act(store)


def test_more_than_fits_in_memory(store: actstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CELLS", 100)
    with pytest.raises(JobError, match="choose fewer features, or token ids with tokens="):
        by_token(store, SHAKESPEARE_HOOK, [0])
    assert len(by_token(store, SHAKESPEARE_HOOK, [0], tokens=range(90)).token_ids) > 5

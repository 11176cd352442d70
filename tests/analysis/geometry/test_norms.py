"""Norms by position and token against NumPy, from stored norms and from values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore import analysis
from actstore.errors import JobError
from actstore.facade import Store
from actstore.store.reading.stored_norms import StoredNorms
from tests.analysis.stores import HOOK, D, store_of

POST = "blocks.*.hook_resid_post"


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("is_stored", [True, False])
def test_same_as_numpy(is_stored: bool, real_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_stored:
        monkeypatch.setattr(StoredNorms, "ranges", ())
    found = analysis.norms(real_store, POST, seqpos=slice(1, 20))
    lengths, tokens = np.asarray(real_store.lengths[:]), np.asarray(real_store.tokens[:])
    taken = np.arange(64) < lengths[:, None]
    taken[:, 0] = taken[:, 20:] = False
    assert found.n_rows == taken.sum()
    np.testing.assert_array_equal(found.count_by_position, taken.sum(0))
    np.testing.assert_array_equal(found.count_by_token, np.bincount(tokens[taken]))
    for row, hook in enumerate(found.hooks):
        norms = np.linalg.norm(real_store[hook][:].numpy().astype(np.float64), axis=-1)
        for position in (1, 7, 19):
            some = norms[taken[:, position], position]
            assert found.mean_by_position[row, position] == pytest.approx(some.mean(), rel=1e-6)
            assert found.std_by_position[row, position] == pytest.approx(some.std(), rel=1e-3, abs=1e-4)
        assert np.isnan(found.mean_by_position[row, [0, 20, 63]]).all()
        for token in np.unique(tokens[taken]):
            of_token = norms[taken & (tokens == token)]
            assert found.mean_by_token[row, token] == pytest.approx(of_token.mean(), rel=1e-6)
            assert found.max_by_token[row, token] == pytest.approx(of_token.max(), rel=1e-6)
        assert found.mean_by_hook[row] == pytest.approx(norms[taken].mean(), rel=1e-6)
    unseen = np.flatnonzero(found.count_by_token == 0)
    assert np.isnan(found.mean_by_token[:, unseen]).all()
    assert np.isnan(found.max_by_token[:, unseen]).all()


def test_values_are_not_read_where_norms_are_stored(
    real_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actstore.analysis.scanning.unit import ScanWorker

    def fail(*args: Any) -> None:
        raise AssertionError("values are read")

    monkeypatch.setattr(ScanWorker, "_read", fail)
    assert analysis.norms(real_store, POST).n_rows == np.asarray(real_store.lengths[:]).sum()


def test_tokens_with_the_largest_norm(tmp_path: Path) -> None:
    values = np.ones((10, 8, D), np.float32)
    values[2, 3] *= 9  # the example's tokens count upwards
    values[1, 1] *= 7
    found = analysis.norms(store_of(tmp_path, values), HOOK)
    first, second = found.top_tokens(HOOK, 2)
    assert (first.token, first.count, first.mean, first.largest) == (2 * 8 + 3, 1, 36, 36)
    assert second.token == 9
    assert not found.top_tokens(HOOK, 2, least=2)
    with pytest.raises(JobError, match="there are no norms of z"):
        found.top_tokens("z")


def test_rows_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    values = np.ones((10, 8, D), np.float32)
    values[2, 3, 1] = np.inf
    values[4, 4, 1] = np.nan
    found = analysis.norms(store_of(tmp_path, values), HOOK)
    assert (found.n_rows, found.n_not_finite) == (78, 2)
    assert found.mean_by_hook.tolist() == [4]


@pytest.mark.usefixtures("small_units")
def test_kept_units_give_the_same_bits(real_store: Store, tmp_path: Path) -> None:
    whole = analysis.norms(real_store, POST, resume=str(tmp_path))
    again = analysis.norms(actstore.open(real_store.url), POST, resume=str(tmp_path))
    for name in ("mean_by_position", "std_by_position", "mean_by_token", "max_by_token"):
        assert getattr(whole, name).tobytes() == getattr(again, name).tobytes()


def test_picture_and_table(real_store: Store, tmp_path: Path) -> None:
    found = analysis.norms(real_store, POST)
    figure = found.plot(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), found.mean_by_hook)
    there = found.count_by_position > 0
    drawn = np.asarray(figure.axes[1].images[0].get_array())
    np.testing.assert_allclose(drawn[:, there], np.log10(found.mean_by_position[:, there]))
    assert repr(found).startswith("<Norms of 3 hooks over ")
    text = found.top_tokens(found.hooks[0], 1)[0].text
    assert text
    assert f"{found.mean_by_hook[0]:.4g}" in found._repr_html_()

"""Principal components against scikit-learn's, from statistics and from a pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import decomposition

from actstore import analysis
from actstore.errors import JobError
from actstore.facade import Store
from tests.analysis.geometry.conftest import real_rows
from tests.analysis.stores import HOOK, D, store_of
from tests.store.example import HOOKS

POST = "blocks.1.hook_resid_post"


def assert_same_as_scikit(ours: analysis.PCA, rows: NDArray[np.float64], k: int) -> None:
    theirs = decomposition.PCA(n_components=k, svd_solver="full").fit(rows)
    scale = theirs.explained_variance_[0]
    # A variance is a mean square less the square of the mean, each rounded to float64.
    rounding = 1e-12 * scale + 1e-15 * (rows**2).mean(0).sum()
    np.testing.assert_allclose(ours.mean, theirs.mean_, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.explained_variance, theirs.explained_variance_, atol=rounding)
    np.testing.assert_allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio_, atol=1e-9)
    np.testing.assert_allclose(ours.components, theirs.components_, atol=1e-6)
    shaped = rows.reshape(-1, *ours.shape)
    np.testing.assert_allclose(ours.transform(shaped), theirs.transform(rows), atol=1e-5 * scale**0.5)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_same_as_scikit_learn(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n = data.draw(st.integers(5, 60))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Variances far apart, so that components are well defined, around a mean that is larger than all of them.
    values = random.standard_normal((n, 8, D)) * 2.0 ** -np.arange(D) + random.choice([0, 100], D)
    mixed = (values @ np.linalg.qr(random.standard_normal((D, D)))[0]).astype(np.float32)
    seqpos = data.draw(st.sampled_from([None, slice(1, None), [0, 5, 6]]))
    chosen = random.random(n) < 0.8
    chosen[:5] = True
    k = data.draw(st.integers(1, 4))
    store = store_of(tmp_path_factory.mktemp("pca"), mixed)
    ours = analysis.pca(store, HOOK, k, seqpos=seqpos, sequences=chosen)
    rows = mixed[chosen][:, slice(None) if seqpos is None else seqpos].reshape(-1, D).astype(np.float64)
    assert (ours.count, ours.n_components, ours.is_from_statistics) == (len(rows), k, False)
    assert_same_as_scikit(ours, rows, k)


@pytest.mark.usefixtures("small_units")
def test_covariances_of_a_store_are_used_for_all_rows(real_store: Store) -> None:
    told: list[Any] = []
    stored = analysis.pca(real_store, POST, 5, drop="pad", on_progress=told.append)
    assert stored.is_from_statistics
    assert not told, "nothing is read"
    read = analysis.pca(real_store, POST, 5, sequences=slice(None))
    assert not read.is_from_statistics
    rows = real_rows(real_store, POST)
    for ours in (stored, read):
        assert ours.count == len(rows)
        assert_same_as_scikit(ours, rows, 5)
    assert not analysis.pca(real_store, POST, 5, seqpos=slice(1, None)).is_from_statistics


def test_heads_have_components_over_all_of_them(real_store: Store) -> None:
    ours = analysis.pca(real_store, ("z", 1), 3)
    rows = real_rows(real_store, "blocks.1.attn.hook_z")
    assert_same_as_scikit(ours, rows, 3)
    assert tuple(ours.direction(0).shape) == ours.shape == (4, 16)
    np.testing.assert_allclose(ours.direction(2).numpy().ravel(), ours.components[2], rtol=1e-6)
    values = real_store["blocks.1.attn.hook_z"][:2]
    assert ours.transform(values).shape == (2, 64, 3)
    np.testing.assert_allclose(
        ours.transform(values).numpy().reshape(-1, 3), ours.transform(values.numpy()).reshape(-1, 3)
    )


def test_whitened_rows_have_unit_variance(real_store: Store) -> None:
    ours = analysis.pca(real_store, POST, 4)
    rows = real_rows(real_store, POST)
    theirs = decomposition.PCA(n_components=4, svd_solver="full", whiten=True).fit(rows)
    np.testing.assert_allclose(ours.whiten(rows), theirs.transform(rows), atol=1e-6)
    np.testing.assert_allclose(np.cov(ours.whiten(rows).T), np.eye(4), atol=1e-8)
    damped = ours.whiten(rows, epsilon=1.0)
    np.testing.assert_allclose(damped, ours.transform(rows) / np.sqrt(ours.explained_variance + 1.0))


def test_inverse_transform_gives_what_components_hold(real_store: Store) -> None:
    ours = analysis.pca(real_store, ("z", 1), 64)
    values = real_store["blocks.1.attn.hook_z"][3]
    back = ours.inverse_transform(ours.transform(values))
    assert back.shape == values.shape
    torch.testing.assert_close(back, values, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_units")
def test_same_bits_with_any_budget(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((90, 8, D)).astype(np.float32)
    values[7, 3, 2] = np.nan
    store = store_of(tmp_path, values)
    whole = analysis.pca(store, list(HOOKS[:2]), seqpos=slice(None))
    assert {name: one.count for name, one in whole.items()} == {HOOK: 719, HOOKS[1]: 720}, "rows of each hook"
    assert whole[HOOK].n_not_finite == 1
    for max_nbytes in (1, 3 * 8 * D * D):
        assert_same_bits(
            whole, analysis.pca(store, list(HOOKS[:2]), seqpos=slice(None), max_nbytes=max_nbytes)
        )
    alone = analysis.pca(store, HOOKS[1], seqpos=slice(None))
    np.testing.assert_array_equal(alone.mean, whole[HOOKS[1]].mean)


def assert_same_bits(left: analysis.PCAs, right: analysis.PCAs) -> None:
    assert list(left) == list(right)
    for name in left:
        for array in ("components", "explained_variance", "mean"):
            assert getattr(left[name], array).tobytes() == getattr(right[name], array).tobytes()


@pytest.mark.usefixtures("small_units")
def test_interrupted_pass_goes_on_to_the_same_bits(real_store: Store, tmp_path: Path) -> None:
    hooks = ["blocks.*.hook_resid_post"]
    whole = analysis.pca(real_store, hooks, seqpos=slice(1, None))
    told: list[Any] = []

    def stop(progress: Any) -> None:
        told.append(progress)
        if len(told) == 11:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"seqpos": slice(1, None), "resume": str(tmp_path), "max_nbytes": 1}
    with pytest.raises(KeyboardInterrupt):
        analysis.pca(real_store, hooks, on_progress=stop, **options)
    assert [one.n_sequences for one in told] == sorted(one.n_sequences for one in told)
    assert told[-1].n_sequences_in_all == 3 * real_store.shape[0]
    before = set(tmp_path.rglob("*.safetensors"))
    assert before
    assert_same_bits(whole, analysis.pca(real_store, hooks, **options))
    assert before < set(tmp_path.rglob("*.safetensors"))


def test_saved_components_are_read_again(real_store: Store, tmp_path: Path) -> None:
    every = analysis.pca(real_store, "blocks.*.hook_resid_post", 3)
    every.save(tmp_path / "every.safetensors")
    again = analysis.PCAs.load(tmp_path / "every.safetensors")
    assert_same_bits(every, again)
    for name, one in every.items():
        fields = ("shape", "total_variance", "count", "n_not_finite", "is_from_statistics")
        assert [getattr(one, field) for field in fields] == [getattr(again[name], field) for field in fields]
    every[POST].save(tmp_path / "one.safetensors")
    assert repr(analysis.PCA.load(tmp_path / "one.safetensors")) == repr(every[POST])
    with pytest.raises(JobError, match="has components of 3 hooks"):
        analysis.PCA.load(tmp_path / "every.safetensors")


def test_table_of_components(real_store: Store, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    one = analysis.pca(real_store, POST, 3)
    one.save(tmp_path / "one.parquet")
    table = pq.read_table(tmp_path / "one.parquet")
    assert table["component"].to_pylist() == [0, 1, 2]
    assert table["hook"].to_pylist() == [POST] * 3
    np.testing.assert_array_equal(np.array(table["direction"].to_pylist()), one.components)
    np.testing.assert_array_equal(table["explained_variance_ratio"].to_numpy(), one.explained_variance_ratio)


@pytest.mark.parametrize("name", ["absent.safetensors", "text.safetensors", "others.safetensors"])
def test_files_that_hold_no_components(name: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "text.safetensors").write_text("text")
    save_file({"0.mean": np.zeros(3)}, tmp_path / "others.safetensors")
    with pytest.raises(JobError, match=r"there is no file|holds no principal components"):
        analysis.PCA.load(tmp_path / name)


def test_suffix_that_is_unknown(real_store: Store, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"choose \.safetensors or \.parquet"):
        analysis.pca(real_store, POST, 1).save(tmp_path / "one.npz")


@pytest.mark.parametrize("k", [0, D + 1])
def test_components_that_do_not_exist(k: int, tmp_path: Path) -> None:
    store = store_of(tmp_path, np.zeros((10, 8, D), np.float32))
    with pytest.raises(JobError, match="it can be 1 to 16"):
        analysis.pca(store, HOOK, k)


def test_rows_that_are_too_few_or_equal(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.ones((10, 8, D), np.float32))
    with pytest.raises(JobError, match="has 1 rows that are finite"):
        analysis.pca(store, HOOK, seqpos=[0], sequences=[0])
    equal = analysis.pca(store, HOOK, 2)
    assert equal.explained_variance.tolist() == [0, 0]
    assert np.isnan(equal.explained_variance_ratio).all()
    with pytest.raises(JobError, match="has no variance to divide by"):
        equal.whiten(np.ones((3, D), np.float32))


def test_rows_of_another_shape(real_store: Store) -> None:
    with pytest.raises(JobError, match=r"rows have shape \[5, 63\], and \[\.\.\., 64\]"):
        analysis.pca(real_store, POST, 2).transform(torch.zeros(5, 63))


def test_rows_that_are_too_large(monkeypatch: pytest.MonkeyPatch, real_store: Store) -> None:
    monkeypatch.setattr("actstore.analysis.geometry.sums.source.MAX_SIZE", 63)
    with pytest.raises(JobError, match="have 64 elements, and products of rows are computed for up to 63"):
        analysis.pca(real_store, POST)


def test_what_a_notebook_shows(real_store: Store) -> None:
    one = analysis.pca(real_store, POST, 3)
    assert repr(one).startswith(f"<PCA {POST}: 3 components of ")
    assert POST in one._repr_html_()
    assert f"{one.explained_variance_ratio[0]:.1%}" in one._repr_html_()

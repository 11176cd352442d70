"""Differences of means against NumPy over all rows, and their standard errors against a sum over sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import actstore
from actstore import analysis
from actstore.errors import JobError, TokensError
from actstore.facade import Store
from actstore.patching.steering import steering
from actstore.storage.local import LocalBlobs
from tests.analysis.stores import HOOK, D, store_of
from tests.store.slots import ragged, ragged_plan, write_ragged


def by_sequence(values: Any, first: Any, second: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Difference of the means of rows [n_sequences, width, d], and its standard error, from sequence to sequence."""
    values = np.where((first | second)[..., None], values, 0).astype(np.float64)
    means = [values[mask].mean(0) for mask in (first, second)]
    terms = [
        sum(
            sign * (values[i][mask[i]] - mean).sum(0) / mask.sum()
            for sign, mask, mean in ((1, first, means[0]), (-1, second, means[1]))
        )
        for i in range(len(values))
        if first[i].any() or second[i].any()
    ]
    n = len(terms)
    return means[0] - means[1], np.sqrt(n / (n - 1) * np.square(terms).sum(0))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("kind", ["sequences", "rows"])
def test_same_as_numpy(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    # Rows of a sequence have much in common.
    mixed = random.standard_normal((90, 8, D)) + 3 * random.standard_normal((90, 1, D)) + 5
    values = mixed.astype(np.float32)
    if kind == "sequences":
        given: tuple[Any, Any] = (list(range(20)), slice(30, None))
        first, second = np.zeros((90, 8), bool), np.zeros((90, 8), bool)
        first[:20], second[30:] = True, True
    else:
        first = random.random((90, 8)) < 0.3
        second = ~first & (random.random((90, 8)) < 0.5)
        second[40:60] = False
        given = (first, torch.from_numpy(second))
    found = analysis.mean_difference(store_of(tmp_path, values), HOOK, *given)
    vector, error = by_sequence(values, first, second)
    np.testing.assert_allclose(found.vector.numpy(), vector, rtol=1e-6)
    np.testing.assert_allclose(found.first_mean - found.second_mean, vector, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-9)
    assert found.counts == (first.sum(), second.sum())
    assert found.n_sequences == (first | second).any(1).sum()


def test_standard_error_is_that_of_drawn_sequences(tmp_path: Path) -> None:
    """The spread of the difference over many sets of sequences that are drawn anew."""
    random = np.random.default_rng(1)
    sets = random.standard_normal((300, 40, 8, D)) + 2 * random.standard_normal((300, 40, 1, D))
    differences = sets[:, :20].mean((1, 2)) - sets[:, 20:].mean((1, 2))
    found = analysis.mean_difference(
        store_of(tmp_path, sets[0].astype(np.float32)), HOOK, slice(20), slice(20, None)
    )
    assert found.standard_error.mean() == pytest.approx(differences.std(0).mean(), rel=0.1)


def test_kept_columns_select_documents(real_store: Store) -> None:
    labels = np.array(real_store.per_sequence("label").to_pylist())
    years = np.array(real_store.per_sequence("year").to_pylist())
    lengths = np.asarray(real_store.lengths[:])
    hook = "blocks.2.hook_resid_post"
    found = analysis.mean_difference(
        real_store, hook, {"label": "verse"}, {"label": ["prose"], "year": [1601, 1603, 1605]}
    )
    values = real_store[hook][:].numpy()
    is_real = np.arange(values.shape[1]) < lengths[:, None]
    documents = np.asarray(real_store.documents[:])
    first = is_real & (labels == "verse")[:, None] & (documents >= 0)
    second = is_real & np.isin(years, [1601, 1603, 1605])[:, None] & (documents >= 0)
    vector, error = by_sequence(values, first, second)
    assert found.counts == (first.sum(), second.sum())
    np.testing.assert_allclose(found.vector.numpy(), vector, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-6)
    assert "label = verse" in repr(found)
    assert "label = verse" in found._repr_html_()


def test_masks_of_positions_where_only_some_are_stored(tmp_path: Path) -> None:
    chosen = [[0, 4], [], [1, 2, 7], [2], [0, 2, 4], [7]]
    text = ragged([5, 1, 8, 3, 6, 8], chosen, 8)
    blobs = LocalBlobs(tmp_path)
    write_ragged(blobs, text, ragged_plan(text, is_chosen=True))
    store = actstore.open(blobs.url)
    is_there = np.zeros((6, 8), bool)
    for i, row in enumerate(chosen):
        is_there[i, row] = True
    first = np.zeros((6, 8), bool)
    first[:, [0, 1]] = True
    found = analysis.mean_difference(store, HOOK, first, ~first)
    values = text.values[HOOK].reshape(6, 8, -1)
    vector, error = by_sequence(values, first & is_there, ~first & is_there)
    assert found.counts == ((first & is_there).sum(), (~first & is_there).sum())
    np.testing.assert_allclose(found.vector.numpy().ravel(), vector, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.standard_error.ravel(), error, rtol=1e-6)


def test_the_difference_steers(real_store: Store, tiny_model: Any) -> None:
    found = analysis.mean_difference(real_store, ("z", 1), {"label": "verse"}, {"label": "prose"})
    model = actstore.HookedModel.from_pretrained(tiny_model("gpt2"))
    tokens = torch.tensor([[1, 2, 3]])
    seen = {}

    def see(value: torch.Tensor, *, hook: Any) -> None:
        seen["z"] = value.clone()

    name = "blocks.1.attn.hook_z"
    model.run_with_hooks(tokens, fwd_hooks=[steering(found.vector, name, 2.0), (name, see)])
    plain = model.run_with_cache(tokens, names_filter=name)[1][name]
    torch.testing.assert_close(seen["z"], plain + 2 * found.vector)


@pytest.mark.usefixtures("small_units")
def test_interrupted_pass_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((90, 8, D)).astype(np.float32)
    store = store_of(tmp_path / "store", values)
    whole = analysis.mean_difference(store, HOOK, slice(45), slice(45, None))
    told: list[Any] = []

    def stop(progress: Any) -> None:
        told.append(progress)
        if len(told) == 3:
            raise KeyboardInterrupt

    folder = str(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        analysis.mean_difference(store, HOOK, slice(45), slice(45, None), resume=folder, on_progress=stop)
    again = analysis.mean_difference(store, HOOK, slice(45), slice(45, None), resume=folder)
    assert whole.standard_error.tobytes() == again.standard_error.tobytes()
    assert torch.equal(whole.vector, again.vector)
    other = analysis.mean_difference(store, HOOK, slice(46), slice(46, None), resume=folder)
    assert other.counts == (368, 352), "what is kept of other selections is not taken"


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (slice(0, 5), slice(4, 9), "have 8 rows in common"),
        (slice(0, 0), slice(4, 9), "selects no rows"),
        ([10], slice(4, 9), "the store has 10"),
        (np.ones((10, 7), bool), slice(4, 9), r"bool of shape \(10, 7\)"),
        ({}, slice(4, 9), "by no column"),
    ],
    ids=["both", "none", "outside", "shape", "columns"],
)
def test_selections_that_cannot_be(first: Any, second: Any, says: str, tmp_path: Path) -> None:
    store = store_of(tmp_path, np.zeros((10, 8, D), np.float32))
    with pytest.raises(JobError, match=says):
        analysis.mean_difference(store, HOOK, first, second)


def test_columns_and_values_that_are_not_there(real_store: Store) -> None:
    with pytest.raises(TokensError, match="keeps no column speaker"):
        analysis.mean_difference(real_store, ("z", 1), {"speaker": "x"}, {"label": "prose"})
    with pytest.raises(JobError, match="no document has label = song; values of label are 'verse', 'prose'"):
        analysis.mean_difference(real_store, ("z", 1), {"label": "song"}, {"label": "prose"})
    with pytest.raises(JobError, match="is left to take the mean of"):
        analysis.mean_difference(real_store, ("z", 1), slice(0, 5), slice(5, 9), sequences=slice(5, 9))

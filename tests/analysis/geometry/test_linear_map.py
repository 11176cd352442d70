"""Linear maps against scikit-learn's ridge regression on the same documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from actstore import analysis
from actstore.analysis.geometry.documents import draws
from actstore.errors import JobError, LoaderError
from actstore.facade import Store
from tests.analysis.geometry.conftest import real_rows
from tests.analysis.stores import HOOK, D, store_of

FROM, TO = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"


def of_rows(store: Store) -> NDArray[np.int64]:
    """The document of each real token."""
    lengths = np.asarray(store.lengths[:])
    documents: NDArray[np.int64] = np.asarray(store.documents[:])
    return documents[np.arange(documents.shape[1]) < lengths[:, None]]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("l2", [0.01, 30.0])
@pytest.mark.parametrize("kind", ["hooks", "models"])
def test_same_as_scikit_learn(kind: str, l2: float, real_store: Store, changed_store: Store) -> None:
    other = changed_store if kind == "models" else None
    found = analysis.linear_map(real_store, FROM, TO, other_store=other, l2=l2, held_out=0.3, seed=1)
    x, y, documents = real_rows(real_store, FROM), real_rows(other or real_store, TO), of_rows(real_store)
    held_out = np.isin(documents, [d for d in range(60) if draws(np.array([d]), 1)[0] < 0.3])
    fitted = ~held_out & (documents >= 0)
    held_out &= documents >= 0
    assert (found.n_rows, found.n_held_out) == (fitted.sum(), held_out.sum())
    theirs = Ridge(alpha=l2).fit(x[fitted], y[fitted])
    # The solution is as far off as rounding times the condition of the problem.
    np.testing.assert_allclose(found.weight, theirs.coef_.T, atol=1e-7)
    np.testing.assert_allclose(found.bias, theirs.intercept_, atol=1e-7)
    mapped = theirs.predict(x[held_out])
    by_element = r2_score(y[held_out], mapped, multioutput="raw_values")
    np.testing.assert_allclose(found.r2_by_element, by_element, rtol=1e-7)
    whole = r2_score(y[held_out], mapped, multioutput="variance_weighted")
    assert found.r2 == pytest.approx(whole, rel=1e-9)
    in_sample = r2_score(y[fitted], theirs.predict(x[fitted]), multioutput="variance_weighted")
    assert found.r2_in_sample == pytest.approx(in_sample, rel=1e-9)
    np.testing.assert_allclose(found(x[held_out]), mapped, atol=1e-7)


def test_documents_are_held_out_whole(real_store: Store) -> None:
    counts = {
        seed: analysis.linear_map(real_store, FROM, TO, held_out=0.5, seed=seed).n_held_out for seed in (0, 1)
    }
    sizes = np.bincount(of_rows(real_store)[of_rows(real_store) >= 0], minlength=60)
    for seed, n_held_out in counts.items():
        chosen = draws(np.arange(60), seed) < 0.5
        assert n_held_out == sizes[chosen].sum()
    assert counts[0] != counts[1]


def test_draws_are_spread_evenly() -> None:
    numbers = draws(np.arange(20_000), 7)
    histogram = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert histogram.sum() == 20_000
    assert np.abs(histogram - 2000).max() < 200
    assert abs(np.corrcoef(numbers, draws(np.arange(20_000), 8))[0, 1]) < 0.03


def test_saved_maps_are_read_again(real_store: Store, tmp_path: Path) -> None:
    found = analysis.linear_map(real_store, ("z", 1), TO)
    found.save(tmp_path / "map.safetensors")
    again = analysis.LinearMap.load(tmp_path / "map.safetensors")
    assert repr(found) == repr(again)
    rows = torch.randn(2, 3, 64)
    assert torch.equal(found(rows), again(rows))
    assert found(rows).shape == (2, 3, 64)
    assert f"{found.r2:.4f}" in found._repr_html_()
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(JobError, match=r"holds no linear map|there is no file"):
            analysis.LinearMap.load(tmp_path / name)
    with pytest.raises(JobError, match="rows have 63 elements"):
        found(torch.zeros(2, 63))


@pytest.mark.usefixtures("small_units")
def test_interrupted_pass_goes_on_to_the_same_bits(
    real_store: Store, changed_store: Store, tmp_path: Path
) -> None:
    whole = analysis.linear_map(real_store, FROM, TO, other_store=changed_store)
    told: list[Any] = []

    def stop(progress: Any) -> None:
        told.append(progress)
        if len(told) == 7:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"other_store": changed_store, "resume": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        analysis.linear_map(real_store, FROM, TO, on_progress=stop, **options)
    again = analysis.linear_map(real_store, FROM, TO, **options)
    assert whole.weight.tobytes() == again.weight.tobytes()
    assert whole.r2 == again.r2
    same = analysis.linear_map(real_store, FROM, TO, resume=str(tmp_path))
    assert same.r2 != whole.r2, "what is kept of another store is not taken"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"l2": -1.0}, "l2 is -1.0"),
        ({"l2": float("nan")}, "l2 is nan"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"seed": -1}, "seed is -1"),
        ({"held_out": 1e-9}, "held out have 0 rows"),
        (
            {"l2": 0.0, "sequences": slice(4), "seqpos": slice(12), "held_out": 0.5},
            "not determined; give a larger l2",
        ),
    ],
    ids=["negative", "nan", "all", "seed", "none", "undetermined"],
)
def test_maps_that_cannot_be(options: dict[str, Any], says: str, real_store: Store) -> None:
    with pytest.raises(JobError, match=says):
        analysis.linear_map(real_store, FROM, TO, **options)


def test_stores_of_other_tokens(real_store: Store, tmp_path: Path) -> None:
    other = store_of(tmp_path, np.zeros((10, 8, D), np.float32))
    with pytest.raises(LoaderError, match="not over the same tokens"):
        analysis.linear_map(real_store, FROM, HOOK, other_store=other)

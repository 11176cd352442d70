"""CKA against kernels of all rows in NumPy, which are made of no sums."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore import analysis
from actstore.errors import JobError, LoaderError
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from tests.analysis.geometry.conftest import real_rows
from tests.analysis.stores import HOOK, D, plan_of, store_of
from tests.store.example import HOOKS, write_store

POST = "blocks.*.hook_resid_post"


def hsic(k: NDArray[np.float64], kernel: NDArray[np.float64], *, debiased: bool) -> float:
    """HSIC of two kernels [n, n]: the biased estimate, or that of Song et al. (2012), equation 5."""
    n = len(k)
    if not debiased:
        h = np.eye(n) - 1 / n
        return float(np.trace(k @ h @ kernel @ h))
    a, b = (matrix - np.diag(np.diag(matrix)) for matrix in (k, kernel))
    ones = np.ones(n)
    total = np.trace(a @ b) + (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
    return float((total - 2 / (n - 2) * (ones @ a @ b @ ones)) / (n * (n - 3)))


def expected(x: NDArray[np.float64], y: NDArray[np.float64], *, debiased: bool) -> float:
    k, kernel = x @ x.T, y @ y.T
    own = hsic(k, k, debiased=debiased) * hsic(kernel, kernel, debiased=debiased)
    return hsic(k, kernel, debiased=debiased) / float(np.sqrt(own))


def two_hooks(folder: Path, random: np.random.Generator, n: int = 40) -> tuple[Store, Any, Any]:
    """A store of two hooks that have half of their elements in common, far from the origin."""
    x = random.standard_normal((n, 8, D)) + 3
    y = random.standard_normal((n, 8, D)) - 2
    y[..., : D // 2] += x[..., : D // 2]
    plan = plan_of(n)
    columns = {HOOKS[0]: x, HOOKS[1]: y, HOOKS[2]: np.zeros((n, 8, 2, D // 2))}
    written = {name: values.astype(np.float32) for name, values in columns.items()}
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, written, range(plan.n_segments))
    return actstore.open(blobs.url), written[HOOKS[0]], written[HOOKS[1]]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("debiased", [False, True])
def test_same_as_kernels_of_all_rows(debiased: bool, tmp_path: Path) -> None:
    store, x, y = two_hooks(tmp_path, np.random.default_rng(0))
    found = analysis.cka(store, HOOKS[0], HOOKS[1], debiased=debiased, seqpos=slice(1, None))
    rows = [values[:, 1:].reshape(-1, D).astype(np.float64) for values in (x, y)]
    assert found.count == len(rows[0])
    np.testing.assert_allclose(found.values, expected(*rows, debiased=debiased), rtol=1e-10)


@pytest.mark.parametrize("debiased", [False, True])
def test_layers_of_a_model(real_store: Store, debiased: bool) -> None:
    options: Any = {"debiased": debiased, "sequences": slice(8)}
    found = analysis.cka(real_store, POST, **options)
    np.testing.assert_allclose(np.diag(found.values), 1, rtol=1e-12)
    np.testing.assert_array_equal(found.values, found.values.T)
    rows = [real_rows(real_store, name, 8) for name in found.hooks_a]
    np.testing.assert_allclose(found.values[0, 2], expected(rows[0], rows[2], debiased=debiased), rtol=1e-9)
    mixed = analysis.cka(real_store, POST, [("z", 1), ("resid_post", 0)], **options)
    assert mixed.values.shape == (3, 2)
    np.testing.assert_allclose(mixed.values[:, 1], found.values[:, 0], rtol=1e-12)
    z = real_rows(real_store, "blocks.1.attn.hook_z", 8)
    np.testing.assert_allclose(mixed.values[1, 0], expected(rows[1], z, debiased=debiased), rtol=1e-9)


def test_unrelated_rows_have_nothing_in_common_without_bias(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    store, _, _ = two_hooks(tmp_path, random, 5)
    few = analysis.cka(store, HOOKS[0], HOOKS[1], seqpos=[0, 1, 2], sequences=[0, 1, 2, 3])
    fair = analysis.cka(store, HOOKS[0], HOOKS[1], seqpos=[0, 1, 2], sequences=[0, 1, 2, 3], debiased=True)
    assert few.values[0, 0] > fair.values[0, 0] + 0.2


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("debiased", [False, True])
def test_same_bits_with_any_budget_and_after_an_interruption(
    debiased: bool, real_store: Store, tmp_path: Path
) -> None:
    hooks = "blocks.*.hook_resid_post"
    whole = analysis.cka(real_store, hooks, debiased=debiased)
    options: dict[str, Any] = {"debiased": debiased, "resume": str(tmp_path), "max_nbytes": 8 * 64 * 64}
    told: list[Any] = []

    def stop(progress: Any) -> None:
        told.append(progress)
        if len(told) == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.cka(real_store, hooks, on_progress=stop, **options)
    again = analysis.cka(real_store, hooks, **options)
    assert whole.values.tobytes() == again.values.tobytes()


@pytest.mark.parametrize("debiased", [False, True])
def test_two_models_over_the_same_tokens(real_store: Store, changed_store: Store, debiased: bool) -> None:
    found = analysis.cka(real_store, POST, other_store=changed_store, debiased=debiased, sequences=slice(4))
    for row, a in enumerate(found.hooks_a):
        for column, b in enumerate(found.hooks_b):
            x, y = real_rows(real_store, a, 4), real_rows(changed_store, b, 4)
            alike = expected(x, y, debiased=debiased)
            np.testing.assert_allclose(found.values[row, column], alike, rtol=1e-9, err_msg=f"{a} {b}")


@pytest.mark.usefixtures("small_units")
def test_rows_that_are_not_finite_are_left_out_of_all(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    x, y = (random.standard_normal((40, 8, D)).astype(np.float32) for _ in range(2))
    y += x
    bad = x.copy(), y.copy()
    bad[0][3, 2, 1] = np.nan
    bad[1][3, 2, 5] = np.inf
    bad[1][30, 7, 5] = -np.inf
    stores = [store_of(tmp_path / str(i), values) for i, values in enumerate(bad)]
    is_fine = np.ones((40, 8), bool)
    is_fine[3, 2] = is_fine[30, 7] = False
    for max_nbytes in (1, 1 << 30):
        found = analysis.cka(stores[0], HOOK, HOOK, other_store=stores[1], max_nbytes=max_nbytes)
        rows = [values[is_fine].astype(np.float64) for values in (x, y)]
        np.testing.assert_allclose(found.values, expected(*rows, debiased=False), rtol=1e-10)
        assert (found.count, found.n_not_finite) == (318, 2)


def test_stores_of_other_tokens(real_store: Store, tmp_path: Path) -> None:
    other = store_of(tmp_path, np.zeros((10, 8, D), np.float32))
    with pytest.raises(LoaderError, match="not over the same tokens"):
        analysis.cka(real_store, ("resid_post", 0), HOOK, other_store=other)


def test_too_few_rows(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.random.default_rng(0).standard_normal((10, 8, D)).astype(np.float32))
    with pytest.raises(JobError, match="3 rows are finite and not dropped, and CKA needs 4"):
        analysis.cka(store, HOOK, sequences=[0, 1, 2], seqpos=[0], debiased=True)
    assert np.isnan(analysis.cka(store, HOOK, HOOKS[1]).values).all(), "the rows of one hook are all 0"


def test_picture_and_table(real_store: Store, tmp_path: Path) -> None:
    found = analysis.cka(real_store, "blocks.*.hook_resid_post")
    figure = found.plot(tmp_path / "cka.png")
    assert (tmp_path / "cka.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), found.values)
    assert repr(found).startswith("<CKA of 3 x 3 hooks over ")
    assert f"{found.values[0, 1]:.3f}" in found._repr_html_()

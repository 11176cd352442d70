"""``max_norm`` gives the same rows from stored norms as from values, compared with NumPy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.loader.dropping import norm_limit
from actstore.loader.dropping.drop import Drop, valid_rows
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal
from tests.loader.stores import A
from tests.storage.watched import READS, watched
from tests.store import example
from tests.store.example import HOOKS, LENGTH, Columns, N, example_plan, example_tokens, write_store
from tests.store.runs import begin_run, tokens_run

LENGTHS = np.where(np.arange(N) % 3 == 0, 5, LENGTH).astype("<i4")
LARGEST = float(np.finfo(np.float32).max)


def of_all_kinds() -> Columns:
    """Numbers of every size, equal norms, neighbours of them, NaN and infinities, in real tokens and in padding."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((N, LENGTH, 16)).astype("<f4")
    values *= np.float32(10) ** rng.integers(-3, 4, (N, LENGTH, 1)).astype("<f4")
    values[4:12] = 0
    values[4:12, :, 3] = 4096
    values[6, 1:7, 5] = [1e-3, 0.01, 0.1, 1, 2, 4]  # of which float32 has neighbours of 4096, or not
    values[12, 1], values[13, 1:3, 2] = 0, [1e-45, 1e-39]
    values[14, 1, 0], values[14, 2, 0], values[14, 3, :2] = math.nan, math.inf, [math.inf, math.nan]
    values[15, 6, 0], values[15, 7, 0], values[15, 5] = math.nan, math.inf, 1e3
    values[16, 0], values[16, 1, 4] = 3e38, -LARGEST
    return {A: values, HOOKS[1]: values[::-1].copy(), HOOKS[2]: values.reshape(N, LENGTH, 2, 8)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Store]:
    """The same padded store without and with norms."""
    by_norms = {}
    with pytest.MonkeyPatch.context() as patch:
        plan = example_plan()
        tokens = {**example_tokens(plan), "lengths": LENGTHS}
        patch.setattr(example, "example_tokens", lambda _: tokens)
        for norms in (False, True):
            blobs = LocalBlobs(tmp_path_factory.mktemp("norms") / str(norms))
            plan = example_plan(norms=norms)
            write_store(blobs, plan, of_all_kinds(), range(plan.n_segments))
            seal(blobs)
            by_norms[norms] = actstore.open(blobs.url)
    return by_norms


def exact(store: Store, hook: str) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        norms: NDArray[np.float64] = np.linalg.norm(store[hook][:].double().flatten(2).numpy(), axis=2)
    return norms


def kept(store: Store, hook: str, limit: float, **fields: Any) -> NDArray[np.bool_]:
    rows = valid_rows(store, Drop(max_norm=limit, **fields), [hook])
    is_kept = np.zeros(N * LENGTH, bool)
    is_kept[rows.select(np.arange(rows.n_valid))] = True
    return is_kept.reshape(N, LENGTH)


def limits(norms: NDArray[np.float64]) -> list[float]:
    """Limits around every kind of norm: the norm, its neighbours in float64 where the sum is exact, and in float32."""
    sums_in_any_order = [0.0, 1e-45, 4096.0]
    others = [float(norms[place]) for place in ((6, 1), (6, 4), (20, 3), (16, 0))]
    limits_to_try = [*sums_in_any_order, -0.0, 1e-60, LARGEST, 1e300, math.inf]
    limits_to_try += [np.nextafter(norm, to) for norm in sums_in_any_order for to in (-math.inf, math.inf)]
    limits_to_try += [norm * (1 + change) for norm in others for change in (-1e-12, 1e-12)]
    with np.errstate(over="ignore"):
        near = np.array([*sums_in_any_order, *others, LARGEST]).astype(np.float32)
        for to in (-math.inf, math.inf):
            limits_to_try += np.nextafter(near, np.float32(to)).astype(float).tolist()
    return limits_to_try


@pytest.mark.parametrize("hook", HOOKS)
def test_the_same_rows_with_norms_and_without(stores: dict[bool, Store], hook: str) -> None:
    norms = exact(stores[True], hook)
    of_a = exact(stores[True], A)
    n_different = set()
    for limit in limits(of_a):
        expected = norms <= limit
        n_different.add(int(expected.sum()))
        for store in stores.values():
            if expected.any():
                np.testing.assert_array_equal(kept(store, hook, limit), expected, str(limit))
    assert len(n_different) > 10


@pytest.mark.parametrize("limit", [math.nan, -1.0, -1e-60])
def test_limits_that_no_row_keeps(stores: dict[bool, Store], limit: float) -> None:
    for store in stores.values():
        with pytest.raises(LoaderError, match="are dropped"):
            kept(store, A, limit)


def test_with_other_rows_dropped(stores: dict[bool, Store]) -> None:
    is_real = np.arange(LENGTH) < LENGTHS[:, None]
    expected = (exact(stores[True], A) <= 50) & is_real & (np.arange(LENGTH) > 0)
    for store in stores.values():
        fields = {"is_padding_dropped": True, "positions": tuple(range(1, LENGTH))}
        np.testing.assert_array_equal(kept(store, A, 50, **fields), expected)


@pytest.mark.parametrize("nbytes", [1, 600, 5000])
def test_blocks_of_any_size(stores: dict[bool, Store], monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    expected = exact(stores[True], A) <= 4096
    monkeypatch.setattr(norm_limit, "BLOCK_NBYTES", nbytes)
    for store in stores.values():
        np.testing.assert_array_equal(kept(store, A, 4096), expected)


@pytest.mark.parametrize("order", [(False, True, True), (True, False, True), (True, False, False)])
def test_parts_with_norms_and_without(tmp_path: Path, order: tuple[bool, ...]) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    values = of_all_kinds()
    for number, norms in enumerate(order):
        run = f"{number:04d}"
        plan = tokens_run(run, norms=norms)
        begin_run(blobs, plan)
        shifted = {name: np.roll(array, number, axis=0) for name, array in values.items()}
        for segment in range(plan.n_segments):
            example.commit_segment(blobs, plan, segment, shifted)
    store = actstore.open(blobs.url)
    rows = valid_rows(store, Drop(max_norm=4096), [A])
    expected = np.flatnonzero(exact(store, A) <= 4096)
    np.testing.assert_array_equal(rows.select(np.arange(rows.n_valid)), expected)


def calls_of(store: Store, limit: float, **fields: Any) -> list[str]:
    blobs: Blobs = store.blobs  # type: ignore[assignment]
    calls = watched(blobs)
    fresh = store.reopened()
    fresh.blobs = calls
    kept(fresh, A, limit, **fields)
    reads: list[str] = calls.of(READS)
    return reads


def test_values_are_read_only_next_to_the_limit(stores: dict[bool, Store]) -> None:
    assert all(key.startswith("acts/") for key in calls_of(stores[False], 17.0))
    without_padding = calls_of(stores[True], 17.0, is_padding_dropped=True)
    assert {key.split("/")[0] for key in without_padding} == {"norms", "lengths"}
    assert any(key.startswith("acts/") for key in calls_of(stores[True], 4096.0, is_padding_dropped=True))
    # Padding has no norm, so that its values decide.
    assert any(key.startswith("acts/") for key in calls_of(stores[True], 17.0))

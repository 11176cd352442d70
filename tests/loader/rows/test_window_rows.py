"""There are never more than two windows in memory, whatever the sizes of batches and shards."""

import tracemalloc
import uuid
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.facade import Store
from actstore.loader.rows import buffers, window_rows
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import HookArray
from tests.loader.stores import N_ROWS, A, finished, maker_of, rows_of
from tests.store.arrays import bits
from tests.store.example import LENGTH, N, example_plan

WIDTH = 4096
ROW_NBYTES = 4 * WIDTH
SHARD_ROWS = 2 * LENGTH


@pytest.fixture(scope="module")
def store() -> Store:
    """A store of 18 shards of 256 KiB, and one of half that."""
    plan = example_plan(segment_size=2)
    hooks = (HookArray(name=A, shape=(WIDTH,), axes=("d_model",)),)
    whole = plan.model_copy(update={"request": plan.request.model_copy(update={"hooks": hooks})})
    blobs = open_blobs(f"memory://{uuid.uuid4().hex}")
    finished(blobs, whole)
    return actstore.open(blobs.url)


@pytest.mark.parametrize(("batch_size", "share"), [(8, 1), (30, 1), (8, 8), (30, 8), (200, 8)])
def test_two_windows_are_in_memory(
    store: Store, batch_size: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds while a batch lies in several windows with few rows each, and when the next epoch begins."""
    monkeypatch.setattr(buffers, "_MAPPED_NBYTES", 1 << 60)  # so that NumPy allocates, which tracemalloc sees
    monkeypatch.setattr(window_rows, "N_REQUESTS", 1)  # a request holds what it reads a second time
    mask = np.tile(np.arange(LENGTH) < LENGTH // share, (N, 1))
    options: dict[str, Any] = {"batch_size": batch_size // share, "shuffle": "window", "window_rows": 64}
    with store.loader(A, mask=mask, epochs=3, prefetch=0, **options) as loader:
        stored = np.diff(maker_of(loader)._edges) * LENGTH * ROW_NBYTES
        windows = [window for epoch in range(3) for window in maker_of(loader)._order.windows(epoch)]
        largest = max(int(stored[window.shards].sum()) for window in windows)
        assert largest < (64 + 2 * SHARD_ROWS) * ROW_NBYTES
        assert 3 * largest < N_ROWS * ROW_NBYTES
        tracemalloc.start()
        try:
            n_rows = sum(len(batch) for batch in loader)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert n_rows == 3 * N_ROWS // share
    # Memory besides windows: a request, a batch in the making while the caller has one, and its rows of one window,
    # which came from torch's allocator before and were not counted.
    rest = (3 << 17) + 4 * (batch_size // share) * ROW_NBYTES
    assert 2 * largest - SHARD_ROWS * ROW_NBYTES < peak < 2 * largest + rest


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_a_batch_in_many_windows(store: Store, dtype: Any) -> None:
    expected = store[A][:].flatten(0, 1)
    options: dict[str, Any] = {"batch_size": 200, "shuffle": "window", "window_rows": SHARD_ROWS}
    with store.loader(A, dtype=dtype, **options) as loader:
        numbers = rows_of(loader)
        for batch, start in zip(loader, (0, 200), strict=True):
            wanted = expected[numbers[start : start + 200]].to(batch.dtype)
            np.testing.assert_array_equal(bits(batch.nan_to_num()), bits(wanted.nan_to_num()))

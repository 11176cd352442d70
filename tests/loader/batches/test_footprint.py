"""The computed footprint of batches is never less than what they take, and not much more."""

import uuid
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.facade import Store
from actstore.loader.batches.batch_maker import BatchMaker
from actstore.loader.batches.footprint import footprint
from actstore.loader.dropping.valid_rows import SamePositions
from actstore.loader.options import options_of
from actstore.loader.ordering.order import largest_window
from actstore.loader.rows.window_rows import WindowRows
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import HookArray
from tests.loader.stores import A, B, finished
from tests.store.example import LENGTH, example_plan

SHARD_ROWS = 2 * LENGTH


def written(blobs: Any, compression: Any = None) -> Store:
    """A store of 18 shards of 2 sequences and one of 1, with hooks of 64 and of 256 bytes a row."""
    plan = example_plan("float32", compression, segment_size=2)
    hooks = (
        HookArray(name=A, shape=(16,), axes=("d_model",)),
        HookArray(name=B, shape=(64,), axes=("d_model",)),
    )
    finished(blobs, plan.model_copy(update={"request": plan.request.model_copy(update={"hooks": hooks})}))
    return actstore.open(blobs.url)


@pytest.fixture(scope="module")
def remote() -> Store:
    return written(open_blobs(f"memory://{uuid.uuid4().hex}"))


@pytest.mark.parametrize("window_rows", [1, SHARD_ROWS, 50, 100, 1 << 48])
@pytest.mark.parametrize("seed", [0, 1])
def test_windows_are_no_larger_than_told(remote: Store, window_rows: int, seed: int) -> None:
    options = options_of(
        remote, [A, B], batch_size=8, shuffle="window", window_rows=window_rows, seed=seed, epochs=None
    )
    computed = footprint(remote, options)
    maker, most = BatchMaker(remote, options), 0
    try:
        for epoch in range(3):
            for k in range(maker.batches.n_batches):
                maker(epoch, k)
                sources = [one for one in maker._sources.values() if isinstance(one, WindowRows)]
                assert len(sources) == 2
                held = [window.values.nbytes for one in sources for window in one._held.values()]
                most = max(most, sum(held))
    finally:
        maker.close()
    shard = SHARD_ROWS * (64 + 256)
    assert most <= computed.windows <= most + 2 * shard + 2 * shard


def test_batches(remote: Store) -> None:
    def batch(hooks: Any, **options: Any) -> int:
        return footprint(remote, options_of(remote, hooks, batch_size=8, shuffle="window", **options)).batch

    assert batch(A) == 8 * 64
    assert batch([A, B]) == 8 * (64 + 256)
    assert batch([A, B], dtype="float64") == 2 * 8 * (64 + 256)
    assert batch(A, rank=1, world_size=2) == 8 * 64  # rows of all ranks count
    assert batch(A, provenance=True) == 8 * (64 + 28)


def test_files_that_are_mapped_take_nothing(tmp_path: Any) -> None:
    plain = written(LocalBlobs(tmp_path / "plain"))
    packed = written(LocalBlobs(tmp_path / "packed"), "lz4")
    shape = {"batch_size": 8, "shuffle": "window", "window_rows": 1 << 48}
    windows = {
        store: footprint(store, options_of(store, A, **shape)).windows  # type: ignore[arg-type]
        for store in (plain, packed)
    }
    # Shards of a kilobyte do not end at pages, so they cannot be mapped side by side.
    assert windows[packed] == windows[plain] == 37 * LENGTH * 64
    spilled = footprint(packed, options_of(packed, A, cache_dir=tmp_path / "cache", **shape))  # type: ignore[arg-type]
    assert spilled.spilled == {}


def test_windows_of_shards_that_have_rows(remote: Store) -> None:
    options = options_of(remote, A, batch_size=8, shuffle="window", window_rows=SHARD_ROWS)
    computed = footprint(remote, options, SamePositions(37, np.arange(LENGTH) < 1))
    assert computed == footprint(remote, options)  # every shard has valid rows


@pytest.mark.parametrize("window_rows", [1, 16, 17, 40, 200, 1000])
def test_largest_window(window_rows: int) -> None:
    stored = np.array([16] * 18 + [8])
    n_windows, most = largest_window(stored, window_rows)
    assert 1 <= n_windows <= 19
    assert most <= stored.sum()
    assert (n_windows == 1) == (most == stored.sum())

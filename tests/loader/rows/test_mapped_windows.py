"""Windows of mapped files, with a cache, and where not all files at once may be mapped."""

import logging
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actstore.errors import LoaderError, StorageError
from actstore.facade import Store
from actstore.loader.loader import Loader
from actstore.loader.rows import address_range
from actstore.loader.rows.mapped_windows import MappedWindows
from actstore.loader.rows.row_source import RowSource
from actstore.loader.rows.single_rows import SingleRows
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from tests.loader.stores import A, B, check, finished, maker_of
from tests.store.example import Columns, example_plan

WINDOWS: dict[str, Any] = {"batch_size": 20, "shuffle": "window", "window_rows": 100}


@pytest.fixture
def few_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system allows fewer maps than are left to other libraries."""
    limit = tmp_path / "max_map_count"
    limit.write_text("4000\n")
    monkeypatch.setattr(address_range, "_LIMIT", limit)


@pytest.fixture
def remote() -> tuple[Store, Columns]:
    return finished(open_blobs(f"memory://{uuid.uuid4().hex}"), example_plan("bfloat16"))


def sources(loader: Loader) -> list[RowSource]:
    return list(maker_of(loader)._sources.values())


@pytest.mark.parametrize("shuffle", ["window", None])
def test_more_files_than_maps(made: tuple[Store, Columns], few_maps: None, shuffle: Any) -> None:
    del few_maps
    store, values = made
    with store.loader(A, provenance=True, **(WINDOWS | {"shuffle": shuffle})) as loader:
        for batch in loader:
            ids = store.tokens[:][batch.sequences.numpy(), batch.positions.numpy()]
            np.testing.assert_array_equal(batch.tokens.numpy(), ids)
        assert [type(source) for source in sources(loader)] == [MappedWindows, MappedWindows]
    with store.loader(A, **(WINDOWS | {"shuffle": shuffle})) as loader:
        check(loader, A, values[A])


def test_more_files_than_maps_and_rows_from_anywhere(
    made: tuple[Store, Columns], few_maps: None, caplog: pytest.LogCaptureFixture
) -> None:
    del few_maps
    store, values = made
    with caplog.at_level(logging.WARNING), store.loader(A, batch_size=20) as loader:
        check(loader, A, values[A])
        assert [type(source) for source in sources(loader)] == [SingleRows]
    assert len(caplog.records) == 1
    assert f"acts/{A} has 3 files, and this process may map 0 more" in caplog.text
    assert "sysctl -w vm.max_map_count=131072" in caplog.text


def test_cached(remote: tuple[Store, Columns], tmp_path: Path) -> None:
    store, values = remote
    for _ in range(2):
        with store.loader([A, B], cache_dir=tmp_path, **WINDOWS) as loader:
            next(loader)
            assert [type(source) for source in sources(loader)] == [MappedWindows] * 2
        with store.loader(A, cache_dir=tmp_path, **WINDOWS) as loader:
            check(loader, A, values[A])
        for name in open_blobs(store.url).names(f"acts/{A}"):
            if name.startswith("c."):
                open_blobs(store.url).delete(f"acts/{A}/{name}")


@pytest.mark.parametrize("limit", [1_000, 6_000, 12_000, 24_000, 10**6])
def test_room_for_less_than_the_windows_of_all_hooks(
    remote: tuple[Store, Columns], tmp_path: Path, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Three windows of two hooks, of 4.2 kB each, take 25 kB."""
    store, _ = remote
    options: dict[str, Any] = WINDOWS | {"epochs": 2}
    expected = [
        {hook: rows.clone() for hook, rows in batch.items()} for batch in store.loader([A, B], **options)
    ]
    cached = store.loader([A, B], cache_dir=tmp_path, cache_limit=limit, **options)
    for left, right in zip(cached, expected, strict=True):
        for hook in (A, B):
            assert torch.equal(left[hook].view(torch.int16), right[hook].view(torch.int16))
    is_enough = limit > 24_000
    assert ("reads what is not in cache_dir again" in caplog.text) or is_enough
    assert len(caplog.records) <= 1 - is_enough


def test_without_room_nothing_is_read_twice(remote: tuple[Store, Columns], tmp_path: Path) -> None:
    store, values = remote
    with store.loader(A, cache_dir=tmp_path, cache_limit=1_000, **WINDOWS) as loader:
        check(loader, A, values[A])
        metrics = loader.metrics()
        assert (metrics.nbytes_read, metrics.n_cache_misses) == (values[A].nbytes, 0)


def test_trainers_that_share_a_cache_that_is_too_small(
    remote: tuple[Store, Columns], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each trainer alone has room for its two windows, of three."""
    store, _ = remote
    limit = 3 * store[A].rows.nbytes // 4
    options: dict[str, Any] = WINDOWS | {"epochs": 4}
    expected = [batch.view(torch.int16).clone() for batch in store.loader(A, **options)]
    trainers = [store.loader(A, cache_dir=tmp_path, cache_limit=limit, **options) for _ in range(3)]
    for batches in zip(*trainers, expected, strict=True):
        for batch in batches[:-1]:
            assert torch.equal(batch.view(torch.int16), batches[-1])
    assert len(caplog.records) <= 3


def test_global_over_a_cache_without_room_for_single_rows(
    remote: tuple[Store, Columns], few_maps: None, tmp_path: Path
) -> None:
    del few_maps
    store, values = remote
    with store.loader(A, batch_size=20, cache_dir=tmp_path) as loader:
        check(loader, A, values[A])
    with pytest.raises(LoaderError, match="shuffle='global' needs all of acts/.* in cache_dir"):
        next(store.loader(A, batch_size=20, cache_dir=tmp_path, cache_limit=5_000))


def test_closed_while_it_fetches(remote: tuple[Store, Columns], tmp_path: Path) -> None:
    store, values = remote
    loader = store.loader(A, cache_dir=tmp_path, epochs=None, **WINDOWS)
    for _ in range(5):
        next(loader)
        loader.close()
    del loader
    with store.loader(A, cache_dir=tmp_path, **WINDOWS) as loader:
        check(loader, A, values[A])


def test_a_cached_file_that_is_damaged_says_so(remote: tuple[Store, Columns], tmp_path: Path) -> None:
    store, _ = remote
    with store.loader(A, cache_dir=tmp_path, **WINDOWS) as loader:
        list(loader)
    shard = next(path for path in tmp_path.rglob("c.1.0.0"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"c\.1\.0\.0 has 100 bytes where .* is damaged"):
        list(store.loader(A, cache_dir=tmp_path, **WINDOWS))


def test_local_windows_are_those_of_the_store(store: Store) -> None:
    assert isinstance(store.tokens.blobs, LocalBlobs)
    with store.loader(A, **WINDOWS) as loader:
        next(loader)
        assert not any(isinstance(source, MappedWindows) for source in sources(loader))

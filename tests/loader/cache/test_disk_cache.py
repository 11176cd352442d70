"""The disk cache: it does not fetch again what it holds, and it stays within its limit."""

import os
import threading
import time
import tracemalloc
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import actstore
from actstore.errors import LoaderError, StorageError
from actstore.loader.cache import disk_cache
from actstore.loader.cache.disk_cache import DiskCache, NoRoomError
from actstore.loader.rows.address_range import AddressRange
from actstore.loader.rows.cached_range import cached_range
from actstore.loader.rows.shard_places import ShardPlaces
from actstore.storage.blobs import BlobInfo, BlobNotFoundError, Blobs, Distant
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.storage.partial_files import PARTIAL
from actstore.store.reading.checksums import Checksums
from actstore.store.reading.sections import PIECE_NBYTES
from actstore.store.records.run import read_runs
from actstore.store.records.seal import seal
from tests.commands import FORKS, start_server
from tests.store.example import HOOKS, example_plan, example_values, write_store
from tests.store.runs import bytes_below

A = HOOKS[0]
NBYTES = 1_000


@pytest.fixture
def blobs() -> Blobs:
    """Ten blobs of 1,000 bytes; every byte of the i-th is i."""
    made = open_blobs(f"memory://{uuid.uuid4().hex}")
    for i in range(10):
        made.create(f"a/{i}", [bytes([i]) * NBYTES])
    return made


@pytest.fixture
def remote(tmp_path: Path) -> tuple[actstore.Store, actstore.Store]:
    """The same store on remote storage and on a local disk."""
    there, here = open_blobs(f"memory://{uuid.uuid4().hex}"), LocalBlobs(tmp_path / "store")
    plan = example_plan("bfloat16")
    values = example_values(plan)
    for blobs in (there, here):
        write_store(blobs, plan, values, range(plan.n_segments))
        seal(blobs)
    return actstore.open(there.url), actstore.open(here.url)


def taken(store: actstore.Store, **options: Any) -> list[torch.Tensor]:
    with store.loader(A, **({"batch_size": 32, "window_rows": 150, "seed": 2} | options)) as loader:
        return [batch.view(torch.int16).clone() for batch in loader]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("shuffle", ["global", "window", None])
def test_what_was_read_is_not_read_again(
    remote: tuple[actstore.Store, actstore.Store], tmp_path: Path, shuffle: Any
) -> None:
    there, here = remote
    options: dict[str, Any] = {"shuffle": shuffle, "cache_dir": tmp_path / "cache"}
    assert same(taken(there, **options), taken(here, shuffle=shuffle))
    blobs, folder = open_blobs(there.url), there[A].rows.path
    for name in blobs.names(folder):
        if name.startswith("c."):
            blobs.delete(f"{folder}/{name}")
    with pytest.raises(StorageError):
        taken(there, shuffle="window")
    assert same(taken(there, epochs=2, **options), taken(here, shuffle=shuffle, epochs=2))


def test_global_needs_all_of_it(remote: tuple[actstore.Store, actstore.Store], tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="needs all of acts/.* in cache_dir, .* and cache_limit is 5000"):
        taken(remote[0], cache_dir=tmp_path / "cache", cache_limit=5_000)


def test_global_needs_all_of_all_hooks(remote: tuple[actstore.Store, actstore.Store], tmp_path: Path) -> None:
    """Each hook alone has room: together, one would remove what the other has to fetch again."""
    store = remote[0]
    limit = 3 * store[A].rows.nbytes // 2
    taken(store, cache_dir=tmp_path / "cache", cache_limit=limit)
    loader = store.loader(list(HOOKS[:2]), batch_size=8, cache_dir=tmp_path / "cache", cache_limit=limit)
    with pytest.raises(LoaderError, match=f"bytes are needed in cache_dir beside .* cache_limit is {limit}"):
        next(loader)


@pytest.mark.parametrize(("limit", "folder"), [(0, "cache"), (100, None)])
def test_refused(remote: tuple[actstore.Store, actstore.Store], limit: int, folder: str | None) -> None:
    with pytest.raises(LoaderError, match="give a folder and 1 byte or more"):
        remote[0].loader(A, batch_size=8, cache_dir=folder, cache_limit=limit)


def test_window_with_less_room_than_the_store(
    remote: tuple[actstore.Store, actstore.Store], tmp_path: Path
) -> None:
    there, here = remote
    cache = tmp_path / "cache"
    options: dict[str, Any] = {"shuffle": "window", "epochs": 3}
    assert same(taken(there, cache_dir=cache, cache_limit=6_000, **options), taken(here, **options))
    assert sizes(cache) <= 6_000


def test_what_was_not_used_for_longest_goes(blobs: Blobs, tmp_path: Path) -> None:
    cache = DiskCache(blobs, tmp_path, "a", 4 * NBYTES)
    for i in (0, 1, 2, 3, 0, 4, 5):
        cache.fetch(f"a/{i}")
        path = cache.files.path(f"a/{i}")
        os.utime(path, ns=(0, path.stat().st_mtime_ns))
    left = {i for i in range(10) if cache.files.head(f"a/{i}") is not None}
    assert left == {0, 3, 4, 5}
    assert bytes(cache.read("a/1")) == bytes([1]) * NBYTES
    assert (cache.n_hits, cache.n_misses) == (1, 7)


def test_other_files_of_the_folder_stay(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    mine = tmp_path / "thesis" / "notes.tex"
    mine.write_bytes(bytes(9 * NBYTES))
    cache = DiskCache(blobs, tmp_path, "a", 3 * NBYTES)
    for i in range(10):
        cache.fetch(f"a/{i}")
    assert mine.exists()
    assert cache.files.head("a/9") is not None


def test_stores_of_one_url_are_told_apart(blobs: Blobs, tmp_path: Path) -> None:
    DiskCache(blobs, tmp_path, "first", None).fetch("a/1")
    second = DiskCache(blobs, tmp_path, "second", None)
    assert second.files.head("a/1") is None


def test_another_store_of_the_same_plan_at_the_same_place(tmp_path: Path) -> None:
    """A store that is removed and extracted again with other libraries has the same plan and different bits."""
    there, plan = open_blobs(f"memory://{uuid.uuid4().hex}"), example_plan("bfloat16")
    for is_sealed in (True, False, False):
        values = {
            name: array ^ np.uint16(uuid.uuid4().int & 0xFF) for name, array in example_values(plan).items()
        }
        for key in bytes_below(there):
            there.delete(key)
        write_store(there, plan, values, range(plan.n_segments))
        if is_sealed:
            seal(there)
        store = actstore.open(there.url)
        cached = taken(store, shuffle=None, cache_dir=tmp_path)
        np.testing.assert_array_equal(torch.cat(cached).numpy().view(np.uint16), values[A].reshape(-1, 16))


class OfPieces(Distant):
    """A blob of 40 MB that takes no memory."""

    url = "pieces://"
    n_retries = 0
    n_heads = 0
    is_replaced = False

    def head(self, key: str) -> BlobInfo:
        del key
        self.n_heads += 1
        return BlobInfo(40_000_000, str(self.n_heads) if self.is_replaced else "same", {})

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        del key
        out[:] = start // PIECE_NBYTES

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> bytes:
        raise NotImplementedError


def test_memory_of_a_fetch(tmp_path: Path) -> None:
    cache = DiskCache(OfPieces(), tmp_path, "a", None)
    tracemalloc.start()
    cache.fetch("a/1")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * PIECE_NBYTES
    data = np.frombuffer(cache.files.read("a/1"), np.uint8)
    assert (data == np.arange(40_000_000) // PIECE_NBYTES).all()


def test_a_blob_that_is_replaced_while_it_is_fetched(tmp_path: Path) -> None:
    blobs = OfPieces()
    blobs.is_replaced = True
    cache = DiskCache(blobs, tmp_path, "a", None)
    with pytest.raises(StorageError, match="a/1 was replaced while it was read; open the store again"):
        cache.fetch("a/1")
    assert sizes(tmp_path) == 0


class Crowded(DiskCache):
    """A cache that shares its disk with a process that removes a file before it can be opened."""

    n_left = 2

    def fetch(self, key: str) -> None:
        super().fetch(key)
        if self.n_left:
            self.n_left -= 1
            self.files.path(key).unlink()


def test_files_that_go_before_they_are_mapped_are_fetched_again(
    remote: tuple[actstore.Store, actstore.Store], tmp_path: Path
) -> None:
    rows = remote[0][A].rows
    cache = Crowded(rows.blobs, tmp_path, "a", None)
    places = ShardPlaces(rows.layouts)

    def mapped() -> AddressRange:
        return cached_range(cache, places, np.arange(3), threading.Event(), 1)

    assert mapped().nbytes == places.nbytes.sum()
    cache.n_left = 1_000
    with pytest.raises(
        NoRoomError, match="files are removed by others before they can be used, so cache_limit"
    ):
        mapped()


def test_a_file_that_goes_meanwhile_is_fetched_again(blobs: Blobs, tmp_path: Path) -> None:
    cache = DiskCache(blobs, tmp_path, "a", None)
    out = np.zeros(10, np.uint8)
    for _ in range(3):
        cache.read_into("a/7", 5, out)
        assert (out == 7).all()
        cache.files.delete("a/7")


class Counted(OfPieces):
    """Counts the bytes that are read of the blob."""

    def __init__(self) -> None:
        self.nbytes = 0

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        super().read_into(key, start, out)
        self.nbytes += out.nbytes


@pytest.mark.parametrize("is_removed", [False, True], ids=["too large", "removed each time"])
def test_what_does_not_fit_is_not_fetched_whole_for_each_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    blobs = Counted()
    cache = DiskCache(blobs, tmp_path, "a", None if is_removed else 30_000_000)
    read = cache.files.read_into

    def read_what_is_gone(key: str, start: int, out: NDArray[np.uint8]) -> None:
        cache.files.delete(key)
        read(key, start, out)

    if is_removed:
        monkeypatch.setattr(cache.files, "read_into", read_what_is_gone)
    out = np.empty(4_194_304, np.uint8)
    for start in range(0, 33_554_432, len(out)):
        cache.read_into("a/1", start, out)
        assert (out == start // PIECE_NBYTES).all()
    assert blobs.nbytes == 33_554_432 + 3 * 40_000_000 * is_removed


def test_files_of_another_user(blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's files can be read, and nothing else."""
    for i in range(3):
        DiskCache(blobs, tmp_path, "a", None).fetch(f"a/{i}")

    def refuse(*_args: Any, **_keywords: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    cache = DiskCache(blobs, tmp_path, "a", 2 * NBYTES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        patch.setattr(Path, "unlink", refuse)
        patch.setattr(disk_cache, "locked", refuse)
        assert bytes(cache.read("a/1")) == bytes([1]) * NBYTES
        assert (cache.n_hits, cache.n_misses) == (1, 0)
        cache.make_room()
    assert sizes(tmp_path) == 3 * NBYTES


def test_no_such_blob(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(BlobNotFoundError, match="a/99 does not exist"):
        DiskCache(blobs, tmp_path, "a", None).fetch("a/99")


def test_what_a_killed_process_left_is_removed(blobs: Blobs, tmp_path: Path) -> None:
    files = DiskCache(blobs, tmp_path, "a", None).files
    left = files.path(f"{PARTIAL}/7.half")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    DiskCache(blobs, tmp_path, "a", None)
    assert left.exists()  # it can belong to a process that is still running
    os.utime(left, (0, time.time() - 3_600))
    cache = DiskCache(blobs, tmp_path, "a", None)
    assert not left.exists()
    assert bytes(cache.read("a/7")) == bytes([7]) * NBYTES


def test_threads(blobs: Blobs, tmp_path: Path) -> None:
    cache = DiskCache(blobs, tmp_path, "a", 5 * NBYTES)
    wrong = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 10, 200).tolist():
            if bytes(cache.read(f"a/{i}", 3, 500)) != bytes([i]) * 500:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    cache.make_room()
    assert sizes(tmp_path) <= 5 * NBYTES


def _read_many(source: str, folder: str, seed: int) -> None:
    cache = DiskCache(LocalBlobs(source), folder, "a", 5 * NBYTES)
    for i in np.random.default_rng(seed).integers(0, 10, 100).tolist():
        if bytes(cache.read(f"a/{i}")) != bytes([i]) * NBYTES:
            os._exit(1)


def test_processes(tmp_path: Path) -> None:
    source = LocalBlobs(tmp_path / "source")
    for i in range(10):
        source.create(f"a/{i}", [bytes([i]) * NBYTES])
    start_server()
    arguments = [(source.url, str(tmp_path / "cache"), seed) for seed in range(3)]
    processes = [FORKS.Process(target=_read_many, args=process_arguments) for process_arguments in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sizes(tmp_path / "cache") <= 8 * NBYTES


def test_what_was_not_committed_does_not_get_into_it(tmp_path: Path) -> None:
    """A damaged shard is reported each time, and is not silently read from the cache later."""
    there = open_blobs(f"memory://{uuid.uuid4().hex}")
    plan = example_plan()
    write_store(there, plan, example_values(plan), range(plan.n_segments))
    key = plan.activations(plan.request.hooks[0]).key(1)
    data = bytearray(bytes(there.read(key)))
    data[100] ^= 1
    there.delete(key)
    there.create(key, [bytes(data)])
    cache = DiskCache(there, tmp_path, "a store", None, Checksums(there, read_runs(there)))
    for _ in range(2):
        with pytest.raises(StorageError, match="damaged or was replaced"):
            cache.read(key, 0, 64)
        assert cache.files.head(key) is None

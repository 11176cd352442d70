"""Stores that go on being the one that was opened, and shards that are not what was committed."""

import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.records.manifest import MANIFEST_KEY
from actstore.store.records.seal import seal, unseal
from tests.storage.watched import WatchedBlobs
from tests.store.example import HOOKS, N, commit_segment, example_plan, example_values, write_store
from tests.store.runs import ATTN_OUT, MLP_OUT, bytes_below, hooks_run, tokens_run, write_run

A = HOOKS[0]


@pytest.fixture(params=["disk", "memory", "s3fs", "obstore"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Blobs:
    if request.param == "disk":
        return LocalBlobs(tmp_path / "store")
    if request.param == "memory":
        return open_blobs(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setenv("ACTSTORE_S3", request.param)
    return open_blobs(request.getfixturevalue("s3_url"))


def same(found: Any, expected: Any) -> bool:
    return np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.s3
def test_a_store_that_grows_is_the_same(blobs: Blobs) -> None:
    """Segment by segment, then sealed, then with further hooks and further tokens."""
    plan = example_plan()
    values = example_values(plan)
    write_store(blobs, plan, values, [0])
    store = actstore.open(blobs.url)

    def check() -> None:
        assert same(store[A].numpy(slice(0, 16)), values[A][:16])
        assert same(store[A].numpy(([1, 3], 2)), values[A][[1, 3], 2])

    check()
    for index in (1, 2):
        commit_segment(blobs, plan, index, values)
        check()
    seal(blobs)
    check()
    store.refresh()
    check()
    unseal(blobs)
    write_run(blobs, hooks_run("0001", MLP_OUT))
    check()
    newer = store.newer()
    seal(blobs)
    unseal(blobs)
    write_run(blobs, tokens_run("0002", A, MLP_OUT))
    for each in (store, newer):
        each.refresh()
        assert each.shape[0] == 2 * N
        assert same(each[A].numpy(slice(0, N)), values[A])
    write_run(blobs, hooks_run("0003", ATTN_OUT))
    check()


@pytest.mark.s3
def test_the_same_bytes_again_are_the_same_store(blobs: Blobs) -> None:
    """A shard that was removed and made again, as a repair does, or all of the store."""
    plan = example_plan()
    values = example_values(plan)
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)
    store = actstore.open(blobs.url)
    assert same(store[A].numpy(slice(None)), values[A])
    for prefix in (f"acts/{A}/c.1", ""):
        before = {key: data for key, data in bytes_below(blobs).items() if key.startswith(prefix)}
        for key in before:
            blobs.delete(key)
        for key, data in before.items():
            assert blobs.create(key, [data])
        assert same(store[A].numpy(3), values[A][3])
        assert same(store[A].numpy(slice(10, N)), values[A][10:])
    store.refresh()
    assert same(store[A].numpy(20), values[A][20])


@pytest.mark.parametrize("is_sealed", [False, True])
def test_files_that_have_another_inode_are_the_same_store(is_sealed: bool, tmp_path: Path) -> None:
    """A backup that was put back with its times has other inodes, and so has a mount that makes them up."""
    plan = example_plan()
    values = example_values(plan)
    blobs = LocalBlobs(tmp_path / "store")
    write_store(blobs, plan, values, range(plan.n_segments))
    if is_sealed:
        seal(blobs)
    store = actstore.open(blobs.url)
    assert same(store[A].numpy(slice(0, 16)), values[A][:16])
    identity = store.identity
    for path in [path for path in (tmp_path / "store").rglob("*") if path.is_file()]:
        copy = shutil.copy2(path, tmp_path / "copy")
        assert Path(copy).stat().st_ino != path.stat().st_ino
        Path(copy).rename(path)
    assert same(store[A].numpy(slice(None)), values[A])
    store.refresh()
    assert actstore.open(blobs.url).identity == store.identity == identity


def flipped(blobs: Blobs, key: str, place: int) -> None:
    """A bit of an object, in its place."""
    data = bytearray(bytes(blobs.read(key)))
    data[place] ^= 1
    blobs.delete(key)
    assert blobs.create(key, [bytes(data)])


@pytest.mark.parametrize("compression", [None, "lz4"])
@pytest.mark.parametrize("is_sealed", [True, False])
def test_whole_shards_of_remote_storage_are_compared(compression: Any, is_sealed: bool) -> None:
    """Uncompressed values have no checksum of their own: a bit of one was given away before."""
    blobs = open_blobs(f"memory://{uuid.uuid4().hex}")
    plan = example_plan("float32", compression)
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    if is_sealed:
        seal(blobs)
    layout = plan.activations(plan.request.hooks[0])
    store = actstore.open(blobs.url)
    assert same(store[A].numpy(slice(None)), example_values(plan)[A])
    for shard in (0, 2):  # the last one has padding
        flipped(blobs, layout.key(shard), 100)
    fresh = actstore.open(blobs.url)
    assert same(fresh[A].numpy(slice(16, 32)), example_values(plan)[A][16:32])
    for rows in (slice(0, 16), slice(32, N), slice(0, 20), slice(None)):
        with pytest.raises(StorageError, match=r"crc32c .* were committed|is damaged"):
            fresh[A].numpy(rows)
    with (
        fresh.loader(A, batch_size=N, shuffle="window") as loader,
        pytest.raises(StorageError, match=r"were committed|is damaged"),
    ):
        list(loader)


@pytest.mark.parametrize("compression", [None, "lz4"])
@pytest.mark.parametrize(
    "rows",
    [
        [*range(16), 3, 4],
        [5, 6, *range(16)],
        [*range(16), 0, 1],
        [0, 1, *range(16)],
        [*range(16), 15, *range(16)],
        [*range(32, N), N - 1, 32],
        [7, *range(N), 36, 0],
    ],
    ids=lambda rows: f"{len(rows)} rows from {rows[0]}",
)
def test_rows_that_a_list_repeats_beside_whole_shards(rows: list[int], compression: Any) -> None:
    blobs = open_blobs(f"memory://{uuid.uuid4().hex}")
    plan = example_plan("float32", compression)
    values = example_values(plan)
    write_store(blobs, plan, values, range(plan.n_segments))
    assert same(actstore.open(blobs.url)[A].numpy(rows), values[A][rows])
    for shard in {row // 16 for row in rows}:
        flipped(blobs, plan.activations(plan.request.hooks[0]).key(shard), 100)
    with pytest.raises(StorageError, match=r"were committed|is damaged"):
        actstore.open(blobs.url)[A].numpy(rows)


@pytest.mark.parametrize("compression", [None, "lz4"])
@pytest.mark.parametrize("by", ["option", "environment"])
def test_first_use_is_compared_where_asked_for(
    by: str, compression: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    plan = example_plan("float32", compression)
    values = example_values(plan)
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)
    # A byte that the row which is asked for does not have.
    flipped(blobs, plan.activations(plan.request.hooks[0]).key(0), 100)
    if by == "environment":
        monkeypatch.setenv("ACTSTORE_CHECK", "first-use")
        store = actstore.open(blobs.url)
    else:
        store = actstore.open(blobs.url, check="first-use")
    for rows in (15, slice(0, 16), ([15, 20], 3)):
        with pytest.raises(StorageError, match=r"were committed|is damaged"):
            store[A].numpy(rows)
    assert same(store[A].numpy((20, 3)), values[A][20, 3])
    shuffles: tuple[Any, ...] = ("window",) if compression else ("window", "global")
    for shuffle in shuffles:
        with (
            store.loader(A, batch_size=8, shuffle=shuffle) as loader,
            pytest.raises(StorageError, match=r"were committed|is damaged"),
        ):
            list(loader)
        with store.reopened().loader(HOOKS[1], batch_size=8, shuffle=shuffle) as loader:
            assert len(list(loader)) == loader.n_batches


def test_a_check_that_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = example_plan()
    write_store(LocalBlobs(tmp_path), plan, example_values(plan), [0])
    with pytest.raises(StorageError, match="check is 'always'; it can be 'first-use'"):
        actstore.open(tmp_path, check="always")  # type: ignore[arg-type]
    monkeypatch.setenv("ACTSTORE_CHECK", "yes")
    with pytest.raises(StorageError, match="ACTSTORE_CHECK is 'yes'"):
        actstore.open(tmp_path)
    with pytest.raises(StorageError, match="set ACTSTORE_CHECK where it runs"):
        actstore.open("http://127.0.0.1:1/v1/stores/a", check="first-use")


def test_nothing_is_asked_for_but_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tags of the records are read once for a shard, whatever is read of it."""
    plan = example_plan()
    write_store(LocalBlobs(tmp_path), plan, example_values(plan), range(plan.n_segments))
    seal(LocalBlobs(tmp_path))
    store = actstore.open(tmp_path)
    seen = WatchedBlobs(LocalBlobs(tmp_path))
    monkeypatch.setattr(store._version, "_blobs", seen)
    for row in range(N):
        store[A].numpy(row)
    assert seen.calls == [("head", MANIFEST_KEY)] * plan.n_segments

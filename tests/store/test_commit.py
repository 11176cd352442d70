"""Shards and the records that make them part of a store."""

from typing import Any

import pytest

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError, Blobs
from actstore.store.commit import (
    Put,
    commit_key,
    commits_folder,
    committed,
    put,
    read_commit,
    read_plan,
)
from actstore.store.layout import ArrayLayout
from actstore.store.local import LocalBlobs
from actstore.store.shard import crc32c
from tests.store.arrays import encoded, random_bits
from tests.store.example import HOOKS, commit_segment, example_plan, example_values, write_store

LAYOUT = ArrayLayout("acts/h", (37, 8, 16), "float32", ("sequence", "position", "d_model"), 16, 4)


def put_shard(blobs: Blobs, index: int, seed: int = 0) -> Put:
    return put(blobs, LAYOUT, index, encoded(LAYOUT, index, random_bits(LAYOUT, seed)))


def test_record_describes_the_object_in_storage(blobs: Blobs) -> None:
    done = put_shard(blobs, 2)
    assert done.is_own
    stored = blobs.read(done.record.key)
    assert (done.record.key, done.record.nbytes, done.record.crc32c) == (
        LAYOUT.key(2),
        len(stored),
        crc32c(stored),
    )


def test_shard_that_is_there_is_adopted_not_replaced(blobs: Blobs) -> None:
    first = put_shard(blobs, 0, seed=1)
    again = put_shard(blobs, 0, seed=2)
    assert again == Put(first.record, is_own=False)
    assert crc32c(blobs.read(first.record.key)) == first.record.crc32c


def test_equal_shard_that_is_there_is_our_own(blobs: Blobs) -> None:
    assert put_shard(blobs, 0) == put_shard(blobs, 0)


def test_shard_of_another_size_is_refused(blobs: Blobs) -> None:
    blobs.create(LAYOUT.key(0), [b"short"])
    with pytest.raises(StorageError) as caught:
        put_shard(blobs, 0)
    assert str(caught.value) == (
        f"{blobs.url}/acts/h/c.0.0.0 was there before and cannot be taken over: acts/h/c.0.0.0 is damaged: it has 5 "
        f"bytes where {LAYOUT.shard_nbytes(0)} are expected; run `actstore verify {blobs.url} --repair`, then the same "
        "command again"
    )
    assert bytes(blobs.read(LAYOUT.key(0))) == b"short"


def test_commits_are_found_by_listing(blobs: Blobs) -> None:
    plan = example_plan()
    values = example_values(plan)
    assert committed(blobs, plan) == set()
    for index in (2, 0):
        commit_segment(blobs, plan, index, values)
    for stray in ("00000009.json", "notes.json", "1.json"):
        blobs.create(f"{commits_folder(plan.run)}/{stray}", [b"{}"])
    assert committed(blobs, plan) == {0, 2}
    record = read_commit(blobs, plan, 2)
    assert (record.segment, record.n_sequences, set(record.shards)) == (2, 5, set(HOOKS))
    with pytest.raises(BlobNotFoundError):
        read_commit(blobs, plan, 1)


def test_equal_segments_make_equal_records(local: LocalBlobs) -> None:
    plan = example_plan()
    values = example_values(plan)
    other = LocalBlobs(local.root / "other")
    assert commit_segment(local, plan, 0, values).to_bytes() == (
        commit_segment(other, plan, 0, values).to_bytes()
    )


def test_record_finds_a_flipped_bit(local: LocalBlobs) -> None:
    shard = commit_segment(local, (plan := example_plan()), 0, example_values(plan)).shards[HOOKS[0]]
    path = local.path(shard.key)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert crc32c(local.read(shard.key)) != shard.crc32c


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1}', b"\xff\xfe", b"9" * 10_000, b"[" * 100_000])
def test_damaged_record_is_named(local: LocalBlobs, content: bytes) -> None:
    local.create(commit_key("0000", 0), [content])
    with pytest.raises(StorageError, match=r"commits/00000000\.json is "):
        read_commit(local, example_plan(), 0)


@pytest.mark.parametrize(
    "changes",
    [{"segment": 1}, {"n_sequences": 5}, {"shards": {}}],
    ids=["segment", "n_sequences", "shards"],
)
def test_record_of_another_segment_is_damage(local: LocalBlobs, changes: dict[str, Any]) -> None:
    plan = example_plan()
    record = commit_segment(local, plan, 0, example_values(plan)).model_copy(update=changes)
    local.delete(commit_key("0000", 0))
    local.create(commit_key("0000", 0), [record.to_bytes()])
    with pytest.raises(StorageError, match=r"00000000\.json is damaged: it"):
        read_commit(local, plan, 0)


def test_no_store_has_no_plan(blobs: Blobs) -> None:
    assert read_plan(blobs, "0000") is None


def test_plan_reads_back(blobs: Blobs) -> None:
    plan = example_plan("bfloat16")
    write_store(blobs, plan, example_values(plan), segments=())
    assert read_plan(blobs, "0000") == plan

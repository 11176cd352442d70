"""Shards and the records that make them part of a store."""

import pytest

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError, Blobs
from actstore.store.commit import (
    COMMITS,
    commit_key,
    committed,
    put,
    read_commit,
    read_plan,
)
from actstore.store.layout import ArrayLayout
from actstore.store.local import LocalBlobs
from actstore.store.shard import crc32c
from tests.store.example import (
    HOOKS,
    commit_segment,
    encoded,
    example_plan,
    example_values,
    random_bits,
    write_store,
)

LAYOUT = ArrayLayout("acts/h", (37, 8, 16), "float32", ("sequence", "position", "d_model"), 16, 4)


def test_record_describes_the_object_in_storage(blobs: Blobs) -> None:
    record = put(blobs, encoded(LAYOUT, 2, random_bits(LAYOUT)))
    stored = blobs.read(record.key)
    assert (record.key, record.nbytes, record.crc32c) == (LAYOUT.key(2), len(stored), crc32c(stored))


def test_shard_that_is_there_is_adopted_not_replaced(blobs: Blobs) -> None:
    first = put(blobs, encoded(LAYOUT, 0, random_bits(LAYOUT, seed=1)))
    again = put(blobs, encoded(LAYOUT, 0, random_bits(LAYOUT, seed=2)))
    assert again == first
    assert crc32c(blobs.read(first.key)) == first.crc32c


def test_shard_of_another_size_is_refused(blobs: Blobs) -> None:
    blobs.create(LAYOUT.key(0), [b"short"])
    with pytest.raises(StorageError) as caught:
        put(blobs, encoded(LAYOUT, 0, random_bits(LAYOUT)))
    assert str(caught.value) == (
        f"{blobs.url}/acts/h/c.0.0.0 has 5 bytes where {LAYOUT.shard_nbytes(0)} were expected, so it is not "
        "from this run; delete it and run the same command again"
    )
    assert bytes(blobs.read(LAYOUT.key(0))) == b"short"


def test_commits_are_found_by_listing(blobs: Blobs) -> None:
    plan = example_plan()
    values = example_values(plan)
    assert committed(blobs, plan.n_segments) == set()
    for index in (2, 0):
        commit_segment(blobs, plan, index, values)
    for stray in ("00000009.json", "notes.json", "1.json"):
        blobs.create(f"{COMMITS}/{stray}", [b"{}"])
    assert committed(blobs, plan.n_segments) == {0, 2}
    record = read_commit(blobs, 2)
    assert (record.segment, record.n_sequences, set(record.shards)) == (2, 5, set(HOOKS))
    with pytest.raises(BlobNotFoundError):
        read_commit(blobs, 1)


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


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1}', b"\xff\xfe"])
def test_damaged_record_is_named(local: LocalBlobs, content: bytes) -> None:
    local.create(commit_key(0), [content])
    with pytest.raises(StorageError, match=r"commits/00000000\.json is damaged: "):
        read_commit(local, 0)


def test_no_store_has_no_plan(blobs: Blobs) -> None:
    assert read_plan(blobs) is None


def test_plan_reads_back(blobs: Blobs) -> None:
    plan = example_plan("bfloat16")
    write_store(blobs, plan, example_values(plan), segments=())
    assert read_plan(blobs) == plan

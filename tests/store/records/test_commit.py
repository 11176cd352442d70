"""Shards, and the records that make them part of a store."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actstore.errors import StorageError
from actstore.storage.blobs import BlobInfo, BlobNotFoundError, Blobs, Bytes
from actstore.storage.local import LocalBlobs
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import crc32c
from actstore.store.records.commit import (
    CommitRecord,
    commit_key,
    commits_folder,
    committed,
    has_golden,
    read_commit,
    read_plan,
)
from actstore.store.records.shard_writer import Put, put
from tests.store.arrays import encoded, random_bits
from tests.store.example import HOOKS, commit_segment, example_plan, example_values, write_store

LAYOUT = ArrayLayout("acts/h", (37, 8, 16), "float32", ("sequence", "position", "d_model"), 16, 4)


def put_shard(blobs: Blobs, index: int, seed: int = 0, plan_checksum: int | None = None) -> Put:
    shard = encoded(LAYOUT, index, random_bits(LAYOUT, seed))
    return put(blobs, LAYOUT, index, shard, plan_checksum=plan_checksum)


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


def test_shard_of_another_plan_is_refused_where_storage_knows_it(blobs: Blobs) -> None:
    first = put_shard(blobs, 0, seed=1, plan_checksum=1)
    assert put_shard(blobs, 0, seed=2, plan_checksum=1) == Put(first.record, is_own=False)
    assert put_shard(blobs, 0, seed=2) == Put(first.record, is_own=False)
    if not blobs.url.startswith("s3://"):
        return  # without metadata, the writer of the segment has to check the values
    with pytest.raises(StorageError, match="cannot be adopted: it was written by a run of another plan; run"):
        put_shard(blobs, 0, seed=2, plan_checksum=2)


class Noting(LocalBlobs):
    """Storage that keeps metadata, like S3."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.notes: dict[str, Mapping[str, str]] = {}

    def create(self, key: str, parts: Iterable[Bytes], *, metadata: Mapping[str, str] | None = None) -> bool:
        is_ours = super().create(key, parts)
        if is_ours:
            self.notes[key] = metadata or {}
        return is_ours

    def head(self, key: str) -> BlobInfo | None:
        info = super().head(key)
        return None if info is None else replace(info, metadata=self.notes.get(key, {}))


def test_shard_that_was_altered_is_refused_where_storage_knows_it(tmp_path: Path) -> None:
    """The shard has a right index, so only its writer's checksum shows that its bytes differ."""
    blobs = Noting(tmp_path)
    first = put_shard(blobs, 0, seed=1, plan_checksum=1)
    path = blobs.path(LAYOUT.key(0))
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(
        StorageError, match=rf"and its writer recorded {first.record.crc32c}; run `actstore verify"
    ):
        put_shard(blobs, 0, seed=2, plan_checksum=1)
    path.write_bytes(whole)
    assert put_shard(blobs, 0, seed=2, plan_checksum=1) == Put(first.record, is_own=False)
    with pytest.raises(StorageError, match="it was written by a run of another plan"):
        put_shard(blobs, 0, seed=2, plan_checksum=2)


def test_shard_from_before_plans_were_noted_is_adopted(blobs: Blobs) -> None:
    first = put_shard(blobs, 0, seed=1)
    assert put_shard(blobs, 0, seed=2, plan_checksum=1) == Put(first.record, is_own=False)


def test_equal_shard_that_is_there_is_our_own(blobs: Blobs) -> None:
    assert put_shard(blobs, 0) == put_shard(blobs, 0)


def test_shard_of_another_size_is_refused(blobs: Blobs) -> None:
    blobs.create(LAYOUT.key(0), [b"short"])
    with pytest.raises(StorageError) as caught:
        put_shard(blobs, 0)
    assert str(caught.value) == (
        f"{blobs.url}/acts/h/c.0.0.0 was there before and cannot be adopted: acts/h/c.0.0.0 is damaged: it has 5 "
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


def test_what_earlier_versions_did_not_record_is_not_spelled(local: LocalBlobs) -> None:
    """`verify` reports documents that are not in canonical form, so those of earlier versions must be."""
    plan = example_plan(norms=False)
    write_store(local, plan, example_values(plan), [0])
    data = bytes(local.read(commit_key(plan.run, 0)))
    record = CommitRecord.from_bytes(data, "record")
    assert record.golden is not None
    assert set(json.loads(data)) == {
        *("checksum", "format", "segment", "n_sequences", "n_tokens", "shards", "statistics", "golden"),
        "environment",
    }
    assert set(json.loads(data)["golden"]) == {"sequence", "errors"}
    assert record.to_bytes() == data
    later = record.golden.model_copy(update={"reference": "whole"})
    spelled = record.model_copy(update={"golden": later}).to_bytes()
    assert json.loads(spelled)["golden"]["reference"] == "whole"
    assert "norms" not in json.loads(plan.to_bytes())


def test_which_segments_have_a_golden_row() -> None:
    """These segments are part of the format: `verify` of any version expects a golden sequence in them."""
    assert [index for index in range(1100) if has_golden(index)] == [0, 64, 128, 256, 512, 1024]

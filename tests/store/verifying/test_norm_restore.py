"""Damaged norms are found, and made again from the activations if these are intact."""

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c, encode
from actstore.store.format.shard_reader import decode
from actstore.store.records.commit import ObjectRecord, commit_key, read_commit
from actstore.store.records.manifest import shards_key, statistics_key
from actstore.store.records.shards_table import from_parquet
from actstore.store.verifying.repair import repair
from tests.store.example import commit_segment, example_plan
from tests.store.runs import bytes_below
from tests.store.verifying.test_verify import (
    RUN,
    SHARD,
    change_record,
    checked,
    flip,
    found_in,
    make_store,
    numbers,
    overwrite,
)

NORMS = "norms/0000/c.1.0.0"
IN_SEGMENT = (RUN, 1)
OF_NORMS = {shards_key(RUN), statistics_key(RUN), commit_key(RUN, 1), NORMS}


@pytest.fixture
def memory() -> Blobs:
    return open_blobs(f"memory://{uuid.uuid4().hex}")


def with_norms(blobs: Blobs, *, sealed: bool = True) -> Plan:
    return make_store(blobs, example_plan(norms=True), sealed=sealed)


def repaired(blobs: Blobs) -> set[str]:
    check = checked(blobs)
    return set(repair(blobs, check, check.findings))


def other_norms(blobs: Blobs, plan: Plan, steps: int = 4) -> None:
    """Store norms that are not those of the values, with a record that vouches for them."""
    layout = plan.norm_array()
    rows = np.array(decode(layout, 1, blobs.read(NORMS)))
    rows.view(np.int32)[3, 1, 2] += steps
    shard = encode(layout, 1, rows)
    overwrite(blobs, NORMS, b"".join(bytes(part) for part in shard.parts))
    record = ObjectRecord(key=NORMS, nbytes=shard.nbytes, crc32c=shard.crc32c)
    change_record(blobs, plan, 1, norms=record)


DAMAGE: dict[str, Callable[[Blobs, Plan], object]] = {
    "missing": lambda blobs, _: blobs.delete(NORMS),
    "flipped": lambda blobs, _: flip(blobs, NORMS, 100),
    "index flipped": lambda blobs, _: flip(blobs, NORMS, -2),
    "short": lambda blobs, _: overwrite(blobs, NORMS, bytes(blobs.read(NORMS))[:-8]),
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_norms_are_found_and_made_again(memory: Blobs, kind: str, sealed: bool) -> None:
    plan = with_norms(memory, sealed=sealed)
    whole = bytes_below(memory)
    DAMAGE[kind](memory, plan)
    assert found_in(memory) == [(NORMS, *IN_SEGMENT)]
    assert repaired(memory) == {NORMS}
    assert bytes_below(memory) == whole


def test_every_flipped_bit_of_norms_is_found(memory: Blobs) -> None:
    with_norms(memory)
    data = bytes(memory.read(NORMS))
    for place in range(0, len(data), 97):
        flip(memory, NORMS, place)
        assert found_in(memory) == [(NORMS, *IN_SEGMENT)], place
        overwrite(memory, NORMS, data)


def test_norms_that_a_record_vouches_for_are_compared_with_the_values(memory: Blobs) -> None:
    plan = with_norms(memory, sealed=False)
    other_norms(memory, plan)
    (finding,) = checked(memory).findings
    assert (finding.key, finding.run, finding.segment) == (NORMS, *IN_SEGMENT)
    assert "has other norms of blocks.1.hook_resid_post than its values: that of row 3, position 2" in str(
        finding
    )
    # The recorded checksum does not result again, so the segment has to be committed again.
    assert repaired(memory) == {commit_key(RUN, 1), NORMS}
    commit_segment(memory, plan, 1, numbers(plan))
    assert found_in(memory) == []


def test_norms_of_another_machine_are_no_damage(memory: Blobs) -> None:
    other_norms(memory, with_norms(memory, sealed=False), steps=1)
    assert found_in(memory) == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_record_without_norms_or_with_others_is_damage(memory: Blobs, is_there: bool) -> None:
    plan = with_norms(memory, sealed=False)
    norms = read_commit(memory, plan, 1).norms if is_there else None
    changed = None if norms is None else norms.model_copy(update={"key": "norms/0000/c.0.0.0"})
    change_record(memory, plan, 1, norms=changed)
    assert found_in(memory) == [(commit_key(RUN, 1), *IN_SEGMENT)]
    assert [finding.problem for finding in checked(memory).findings] == [
        "is damaged: its norms are not those of the plan"
    ]


def test_norms_go_with_the_values_that_they_are_of(memory: Blobs) -> None:
    """Values are computed again on any machine, with other last bits, and the norms would not be theirs."""
    plan = with_norms(memory)
    flip(memory, SHARD, 100)
    assert repaired(memory) == OF_NORMS | {SHARD}
    assert found_in(memory) == []
    commit_segment(memory, plan, 1, numbers(plan))
    assert found_in(memory) == []


def test_norms_are_not_made_from_damaged_values(memory: Blobs) -> None:
    with_norms(memory)
    flip(memory, NORMS, 100)
    flip(memory, SHARD, 100)
    assert repaired(memory) == OF_NORMS | {SHARD}


@pytest.mark.parametrize("sealed", [False, True])
def test_norms_without_a_record_go_with_any_repair(memory: Blobs, sealed: bool) -> None:
    with_norms(memory, sealed=sealed)
    memory.delete(commit_key(RUN, 1))
    gone = repaired(memory)
    # The table of a finished run vouches for the activations, so they stay.
    assert NORMS in gone
    assert (SHARD in gone) is not sealed
    assert found_in(memory) == []


def test_the_table_of_shards_has_norms(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    plan = with_norms(blobs)
    data = bytes(blobs.read(shards_key(RUN)))
    rows = from_parquet(data, n_rows=4 + 9 + 3).to_pylist()[-3:]
    assert [(row["array"], row["shard"], row["key"]) for row in rows] == [
        ("norms/0000", index, plan.norm_array().key(index)) for index in range(3)
    ]
    assert [row["crc32c"] for row in rows] == [crc32c(blobs.read(row["key"])) for row in rows]

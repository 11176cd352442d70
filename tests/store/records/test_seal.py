"""Sealing gives the same bytes wherever it was interrupted, and hides no run from readers."""

import json
import uuid
from collections.abc import Callable

import numpy as np
import pytest

import actstore
from actstore.errors import StorageError
from actstore.extraction.claim import claim
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c
from actstore.store.locking.lease import LEASES
from actstore.store.records.commit import TokensRecord, commit_key, plan_key, read_commit, tokens_key
from actstore.store.records.manifest import (
    MANIFEST_KEY,
    Manifest,
    RunStatistics,
    read_manifest,
    shards_key,
    statistics_key,
)
from actstore.store.records.seal import remove_scratch, seal, unseal
from actstore.store.records.shards_table import from_parquet
from actstore.store.statistics.merging import merge
from tests.storage.watched import CHANGES, CrashError, watched
from tests.store.example import D_MODEL, HOOKS, commit_segment, example_plan, example_values
from tests.store.runs import MLP_OUT, begin_run, bytes_below, hooks_run, tokens_run, write_run

FIRST, SECOND, THIRD = example_plan(), hooks_run("0001", MLP_OUT), tokens_run("0002", MLP_OUT)


def manifest_of(blobs: Blobs) -> Manifest:
    manifest = read_manifest(blobs)
    assert manifest is not None
    return manifest


def n_rows(plan: Plan) -> int:
    tokens = sum(layout.n_shards for layout in plan.token_arrays()) if plan.has_own_tokens else 0
    return tokens + plan.n_segments * len(plan.hook_names)


def test_the_table_names_every_shard_as_it_lies_there(blobs: Blobs) -> None:
    for plan in (FIRST, SECOND, THIRD):
        write_run(blobs, plan)
    seal(blobs)
    manifest = manifest_of(blobs)
    assert manifest.sealed
    assert [entry.plan for entry in manifest.runs] == [FIRST, SECOND, THIRD]
    keys = []
    for entry in manifest.runs:
        for file in (entry.shards, entry.statistics):
            data = bytes(blobs.read(file.key))
            assert (len(data), crc32c(data)) == (file.nbytes, file.crc32c)
        table = from_parquet(bytes(blobs.read(entry.shards.key)), n_rows=n_rows(entry.plan))
        for row in table.to_pylist():
            data = bytes(blobs.read(row["key"]))
            assert (len(data), crc32c(data)) == (row["nbytes"], row["crc32c"])
            assert row["key"].startswith(f"{row['array']}/c.{row['shard']}")
            keys.append(row["key"])
    assert sorted(keys) == [key for key in sorted(bytes_below(blobs)) if "/c." in key]
    assert keys[:4] == ["tokens/c.0.0", "lengths/c.0", "documents/c.0.0", "offsets/c.0.0"]


def test_statistics_are_those_of_all_records(blobs: Blobs) -> None:
    write_run(blobs, FIRST)
    records = [read_commit(blobs, FIRST, index) for index in range(3)]
    seal(blobs)
    sums = RunStatistics.read(blobs, statistics_key("0000"))
    assert sums.hooks.keys() == set(HOOKS)
    for name in HOOKS[:2]:
        one = merge([sums.hooks[name]], (D_MODEL,))
        expected = merge([record.statistics[name] for record in records], (D_MODEL,))
        assert one.count == expected.count
        np.testing.assert_array_equal(one.mean, expected.mean)


@pytest.mark.parametrize("missing", [tokens_key("0000"), commit_key("0000", 2)])
def test_what_is_not_complete_is_not_summed_up(blobs: Blobs, missing: str) -> None:
    write_run(blobs, FIRST)
    blobs.delete(missing)
    seal(blobs)
    assert manifest_of(blobs) == Manifest(sealed=False, runs=())
    assert shards_key("0000") not in bytes_below(blobs)


def test_a_finished_run_beside_one_that_is_not(blobs: Blobs) -> None:
    write_run(blobs, FIRST)
    write_run(blobs, SECOND, segments=(0, 1))
    write_run(blobs, THIRD)
    seal(blobs)
    assert not manifest_of(blobs).sealed
    assert [entry.plan.run for entry in manifest_of(blobs).runs] == ["0000", "0002"]
    before = bytes_below(blobs)
    commit_segment(blobs, SECOND, 2, example_values(SECOND))
    seal(blobs)
    assert manifest_of(blobs).sealed
    assert [entry.plan.run for entry in manifest_of(blobs).runs] == ["0000", "0001", "0002"]
    after = bytes_below(blobs)
    assert {key for key in before if before[key] != after[key]} == {MANIFEST_KEY}


def crash_at(turn: int, moment: str, calls: list[str]) -> dict[str, Callable[[str, str], None]]:
    """Callbacks that end the process before or after its change number ``turn``."""

    def count(name: str, key: str) -> None:
        if name in CHANGES:
            calls.append(key)
            if len(calls) == turn + 1:
                raise CrashError

    return {moment: count}


def grown(blobs: Blobs) -> None:
    write_run(blobs, FIRST)
    seal(blobs)
    unseal(blobs)
    write_run(blobs, SECOND)


def both(blobs: Blobs) -> None:
    write_run(blobs, FIRST)
    write_run(blobs, SECOND)


def spoilt(blobs: Blobs) -> None:
    both(blobs)
    blobs.create(shards_key("0001"), [b"of another version"])


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("prepare", [grown, both, spoilt], ids=lambda prepare: prepare.__name__)
def test_interrupted_between_any_two_steps_it_gives_the_same_bytes(
    prepare: Callable[[Blobs], None], moment: str
) -> None:
    undisturbed = open_blobs(f"memory://{uuid.uuid4().hex}")
    prepare(undisturbed)
    seal(undisturbed)
    expected = bytes_below(undisturbed)
    n_steps = 0
    for turn in range(20):
        blobs = open_blobs(f"memory://{uuid.uuid4().hex}")
        prepare(blobs)
        try:
            seal(watched(blobs, **crash_at(turn, moment, [])))
        except CrashError:
            n_steps += 1
            assert actstore.open(blobs.url).is_complete
            seal(blobs)
        else:
            break
        assert bytes_below(blobs) == expected
    # For each run that was not in the manifest two files, then the manifest; for a spoilt file also a create that fails
    # and a deletion.
    assert n_steps == {"grown": 3, "both": 5, "spoilt": 7}[prepare.__name__]


def test_a_leftover_that_is_the_same_stays(local: LocalBlobs) -> None:
    write_run(local, FIRST)
    seal(local)
    inodes = [local.path(key).stat().st_ino for key in (shards_key("0000"), statistics_key("0000"))]
    local.delete(MANIFEST_KEY)
    seal(local)
    assert inodes == [local.path(key).stat().st_ino for key in (shards_key("0000"), statistics_key("0000"))]


@pytest.mark.parametrize("key", [shards_key("0000"), statistics_key("0000")])
def test_a_leftover_of_other_content_is_replaced(blobs: Blobs, key: str) -> None:
    write_run(blobs, FIRST)
    seal(blobs)
    expected = bytes_below(blobs)
    for other in (MANIFEST_KEY, key):
        blobs.delete(other)
    blobs.create(key, [b"of another version"])
    seal(blobs)
    assert bytes_below(blobs) == expected


def test_sealing_a_sealed_store_changes_nothing(blobs: Blobs) -> None:
    write_run(blobs, FIRST)
    seal(blobs)
    seal(calls := watched(blobs))
    assert calls.of(CHANGES) == []


def test_unsealing(blobs: Blobs) -> None:
    unseal(blobs)  # nothing is finished, so there is nothing to do
    assert bytes_below(blobs) == {}
    write_run(blobs, FIRST)
    seal(blobs)
    sealed = bytes_below(blobs)
    unseal(blobs)
    assert json.loads(bytes(blobs.read(MANIFEST_KEY)))["sealed"] is False
    assert [entry.plan.run for entry in manifest_of(blobs).runs] == ["0000"]
    assert actstore.open(blobs.url).is_complete
    seal(blobs)
    assert bytes_below(blobs) == sealed


@pytest.mark.parametrize(
    ("before", "after"),
    [("plan, look", ""), ("plan", "look"), ("", "plan, look")],
    ids=lambda steps: steps or "-",
)
def test_a_run_that_begins_while_the_store_is_sealed_is_never_hidden(
    blobs: Blobs, before: str, after: str
) -> None:
    """Its writer reads the manifest, writes its plan, and reads it again, before or after sealing writes it."""
    write_run(blobs, FIRST)
    steps = {"look": lambda: unseal(blobs), "plan": lambda: begin_run(blobs, SECOND)}
    begun: set[str] = set()

    def go_on(todo: str) -> Callable[[str, str], None]:
        def on_manifest(name: str, key: str) -> None:
            if key == MANIFEST_KEY and name in CHANGES and todo not in begun:
                begun.add(todo)
                for step in filter(None, todo.split(", ")):
                    steps[step]()

        return on_manifest

    unseal(blobs)
    seal(watched(blobs, before=go_on(before), after=go_on(after)))
    assert len(actstore.open(blobs.url).runs) == 2
    assert not manifest_of(blobs).sealed


def test_a_store_that_is_sealed_just_before_a_plan_is_unsealed(blobs: Blobs) -> None:
    write_run(blobs, FIRST)

    def on_plan(name: str, key: str) -> None:
        if key == plan_key("0001") and name == "create":
            seal(blobs)
            assert manifest_of(blobs).sealed

    claim(watched(blobs, before=on_plan), SECOND)
    assert not manifest_of(blobs).sealed
    assert len(actstore.open(blobs.url).runs) == 2


def test_a_run_that_a_sealed_manifest_lacks_is_added(blobs: Blobs) -> None:
    """Whoever sealed the store was killed before reading it again."""
    write_run(blobs, FIRST)
    seal(blobs)
    write_run(blobs, SECOND)
    seal(blobs)
    assert [entry.plan.run for entry in manifest_of(blobs).runs] == ["0000", "0001"]
    assert manifest_of(blobs).sealed


def test_a_damaged_record_is_told_and_nothing_is_pointed_to(local: LocalBlobs) -> None:
    write_run(local, FIRST)
    path = local.path(commit_key("0000", 1))
    path.write_bytes(path.read_bytes().replace(b'"segment": 1', b'"segment": 2'))
    with pytest.raises(StorageError, match=r"00000001\.json is damaged"):
        seal(local)
    assert read_manifest(local) is None


def test_a_record_of_the_tokens_that_lacks_a_shard_is_damage(local: LocalBlobs) -> None:
    write_run(local, FIRST)
    record = TokensRecord.read(local, tokens_key("0000"))
    local.delete(tokens_key("0000"))
    local.create(tokens_key("0000"), [TokensRecord(shards=record.shards[:-1]).to_bytes()])
    with pytest.raises(StorageError, match="names 3 shards where 4 were expected; it is damaged"):
        seal(local)


def test_scratch_is_removed_and_nothing_else(blobs: Blobs) -> None:
    write_run(blobs, FIRST)
    seal(blobs)
    before = bytes_below(blobs)
    for name in ("partial/plan.json.0123", "probe/0123", "leases/0000-00000001.json"):
        blobs.create(f"_actstore/{name}", [b"left"])
    remove_scratch(blobs)
    assert bytes_below(blobs) == before


def test_leases_stay_while_a_segment_is_to_do(blobs: Blobs) -> None:
    write_run(blobs, FIRST, segments=(0,))
    seal(blobs)
    blobs.create(f"{LEASES}/0000-00000001.json", [b"held"])
    blobs.create("_actstore/probe/0123", [b"left"])
    remove_scratch(blobs)
    contents = bytes_below(blobs)
    assert f"{LEASES}/0000-00000001.json" in contents
    assert "_actstore/probe/0123" not in contents


def test_scratch_that_may_not_be_removed_stays(local: LocalBlobs) -> None:
    def refuse(name: str, key: str) -> None:
        if name == "delete":
            raise StorageError("no permission")

    write_run(local, FIRST)
    local.create("_actstore/probe/0123", [b"left"])
    remove_scratch(watched(local, before=refuse))
    assert local.read("_actstore/probe/0123") == b"left"
    assert local.head(plan_key("0000")) is not None

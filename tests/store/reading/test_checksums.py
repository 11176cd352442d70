"""Sizes and checksums of shards as they were committed, from the records."""

import threading
from pathlib import Path

import pytest

from actstore.errors import StorageError
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import Plan
from actstore.store.reading.checksums import Checksum, Checksums
from actstore.store.records.commit import TokensRecord, commit_key, tokens_key
from actstore.store.records.manifest import shards_key
from actstore.store.records.run import read_runs
from actstore.store.records.seal import seal, unseal
from tests.storage.watched import watched
from tests.store.example import example_plan, example_values, write_store
from tests.store.runs import MLP_OUT, hooks_run, write_run

WAIT_S = 20


def shard_of(plan: Plan, shard: int) -> str:
    return plan.activations(plan.request.hooks[0]).key(shard)


@pytest.mark.parametrize("slow_key", [shards_key("0000"), commit_key("0001", 1)])
def test_what_is_known_is_told_while_another_record_is_read(slow_key: str, tmp_path: Path) -> None:
    """The table of a finished run, or a commit record of one that goes on."""
    blobs = LocalBlobs(tmp_path)
    finished, going_on = example_plan(), hooks_run("0001", MLP_OUT)
    write_store(blobs, finished, example_values(finished), range(finished.n_segments))
    seal(blobs)
    unseal(blobs)
    write_run(blobs, going_on)
    begun, may_end = threading.Event(), threading.Event()

    def wait(name: str, key: str) -> None:
        if (name, key) == ("read", slow_key):
            begun.set()
            assert may_end.wait(WAIT_S)

    checksums = Checksums(watched(blobs, before=wait), read_runs(blobs))
    key = shard_of(going_on, 0)
    known = checksums[key]
    slow = shard_of(finished if slow_key == shards_key("0000") else going_on, 1)
    told: list[Checksum] = []
    readers = [threading.Thread(target=lambda key=key: told.append(checksums[key])) for key in (slow, key)]
    readers[0].start()
    assert begun.wait(WAIT_S)
    readers[1].start()
    readers[1].join(5)
    told_meanwhile = list(told)
    may_end.set()
    for reader in readers:
        reader.join()
    assert told_meanwhile == [known]
    assert len(told) == 2


def test_a_record_that_does_not_name_a_shard(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    plan = example_plan()
    write_store(blobs, plan, example_values(plan), [0])
    blobs.path(tokens_key(plan.run)).write_bytes(TokensRecord(shards=()).to_bytes())
    with pytest.raises(StorageError, match="the records of run 0000 do not name tokens/c.0.0"):
        _ = Checksums(blobs, read_runs(blobs))["tokens/c.0.0"]


def test_a_damaged_shard_is_told_each_time(tmp_path: Path) -> None:
    blobs, plan = LocalBlobs(tmp_path), example_plan()
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    checksums = Checksums(blobs, read_runs(blobs))
    damaged, whole = shard_of(plan, 1), shard_of(plan, 0)
    with blobs.path(damaged).open("r+b") as file:
        file.write(b"other")
    for _ in range(3):
        with pytest.raises(StorageError, match="it is damaged or was replaced"):
            checksums.check_once(damaged)
        assert not checksums.was_checked(damaged)
    checksums.check_once(whole)
    assert checksums.was_checked(whole)

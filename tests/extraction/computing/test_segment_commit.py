"""Writing a segment: shards that were there before, adopted or refused, and the order of commits."""

import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actstore.errors import BusyError, StorageError
from actstore.extraction.computing.segment_commit import SegmentWriter
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.batches import batches_of
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c, encode
from actstore.store.format.shard_reader import decode
from actstore.store.locking import lease as lease_module
from actstore.store.locking.lease import LEASES, LeaseRecord, lease
from actstore.store.locking.turns import Turn, writing
from actstore.store.records.commit import CommitRecord, Golden, commit_key, read_commit
from actstore.store.records.seal import seal
from actstore.store.records.shard_writer import put
from actstore.store.statistics.moments import recompute
from actstore.store.statistics.norms import side_by_side
from tests.storage.watched import CHANGES, watched
from tests.store.arrays import encoded
from tests.store.example import ENVIRONMENT, HOOKS, Columns, example_plan, example_tokens, example_values
from tests.store.runs import begin_run, bytes_below

PLAN = example_plan(norms=True)
OURS = {
    name: np.random.default_rng(seed).standard_normal(values.shape, np.float32)
    for seed, (name, values) in enumerate(example_values(PLAN).items())
}
THEIRS = {name: np.nextafter(values, np.float32(np.inf)) for name, values in OURS.items()}
"""The record of an earlier attempt, whose environment gave other last bits."""
LAST = PLAN.n_segments - 1


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobs:
    blobs = LocalBlobs(tmp_path / "store")
    begin_run(blobs, PLAN)
    return blobs


@contextmanager
def writer(
    blobs: Blobs,
    *,
    is_strict: bool = False,
    is_conditional: bool = True,
    fence: Callable[[], None] = lambda: None,
) -> Iterator[SegmentWriter]:
    made = SegmentWriter(blobs, PLAN, is_strict=is_strict, is_conditional=is_conditional, fence=fence)
    try:
        yield made
    finally:
        made.close()


def lengths(index: int) -> NDArray[Any]:
    segment = PLAN.segment(index)
    return example_tokens(PLAN)["lengths"][segment.start : segment.stop]


def again(index: int, values: Columns, plan: Plan = PLAN) -> dict[str, Any]:
    """Statistics and norms by hook."""
    segment = plan.segment(index)
    return {
        hook.name: recompute(
            hook,
            values[hook.name][segment.start : segment.stop],
            plan.request.dtype,
            lengths(index),
            batches_of(plan.request, lengths(index)),
        )
        for hook in plan.request.hooks
    }


def statistics(index: int, values: Columns, plan: Plan = PLAN) -> dict[str, Any]:
    return {name: statistics for name, (statistics, _) in again(index, values, plan).items()}


def norms(index: int, values: Columns) -> dict[str, NDArray[np.float32]]:
    return {name: norms for name, (_, norms) in again(index, values).items()}


def rows(index: int, values: Columns) -> dict[str, NDArray[Any]]:
    """Values of one segment, padded to whole inner chunks."""
    segment = PLAN.segment(index)
    padded = {}
    for hook in PLAN.request.hooks:
        layout = PLAN.activations(hook)
        n_rows = layout.chunks_in(index) * layout.chunk_rows
        padded[hook.name] = np.zeros((n_rows, *layout.shape[1:]), np.float32)
        padded[hook.name][: segment.n_sequences] = values[hook.name][segment.start : segment.stop]
    return padded


def write(to: SegmentWriter, index: int, values: Columns = OURS) -> CommitRecord:
    record = CommitRecord(
        segment=index,
        n_sequences=PLAN.segment(index).n_sequences,
        n_tokens=int(lengths(index).sum()),
        shards={},
        statistics=statistics(index, values),
        golden=Golden(sequence=PLAN.segment(index).start, errors={}),
        environment=ENVIRONMENT,
    )
    segment, batches = PLAN.segment(index), batches_of(PLAN.request, lengths(index))
    return to.write(segment, rows(index, values), norms(index, values), record, lengths(index), batches)


def orphan(blobs: Blobs, index: int, hook: str, values: Columns) -> str:
    """Write a shard of a segment that was never committed, and return its key."""
    (array,) = [hook_ for hook_ in PLAN.request.hooks if hook_.name == hook]
    layout = PLAN.activations(array)
    return put(blobs, layout, index, encoded(layout, index, values[hook])).record.key


def inodes(store: LocalBlobs, index: int) -> dict[str, int]:
    keys = {hook.name: PLAN.activations(hook).key(index) for hook in PLAN.request.hooks}
    return {name: store.path(key).stat().st_ino for name, key in keys.items()}


def check_record(blobs: Blobs, index: int, values: Columns) -> None:
    """Check that the record describes the stored objects and these values."""
    record = read_commit(blobs, PLAN, index)
    for shard in record.shards.values():
        data = bytes(blobs.read(shard.key))
        assert (len(data), crc32c(data)) == (shard.nbytes, shard.crc32c)
    assert record.statistics == statistics(index, values)
    assert record.norms is not None
    data = bytes(blobs.read(record.norms.key))
    assert record.norms.is_of(data)
    stored = decode(PLAN.norm_array(), index, data)
    np.testing.assert_array_equal(stored, np.stack([*norms(index, values).values()], axis=1))


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("index", [0, LAST])
def test_a_segment_is_written_and_committed(store: LocalBlobs, index: int, is_strict: bool) -> None:
    with writer(store, is_strict=is_strict) as to:
        record = write(to, index)
    assert record == read_commit(store, PLAN, index)
    check_record(store, index, OURS)
    assert store.names(LEASES) == []


@pytest.mark.parametrize("url", ["local", "memory"])
def test_strict_writers_give_the_same_bytes(store: LocalBlobs, url: str) -> None:
    other: Blobs = open_blobs(
        f"memory://{uuid.uuid4().hex}" if url == "memory" else str(store.root.parent / "strict")
    )
    begin_run(other, PLAN)
    for blobs, is_strict in ((store, False), (other, True)):
        with writer(blobs, is_strict=is_strict) as to:
            for index in range(PLAN.n_segments):
                write(to, index)
        seal(blobs)
    assert bytes_below(store) == bytes_below(other)


@pytest.mark.parametrize("index", [0, LAST])
def test_an_adopted_shard_has_its_own_checksum_and_statistics(store: LocalBlobs, index: int) -> None:
    key = orphan(store, index, HOOKS[1], THEIRS)
    inode = store.path(key).stat().st_ino
    with writer(store) as to:
        record = write(to, index)
    assert inodes(store, index)[HOOKS[1]] == inode
    check_record(store, index, OURS | {HOOKS[1]: THEIRS[HOOKS[1]]})
    assert record.statistics[HOOKS[1]] != statistics(index, OURS)[HOOKS[1]]
    assert record.statistics[HOOKS[0]] == statistics(index, OURS)[HOOKS[0]]


@pytest.mark.parametrize("index", [0, LAST])
def test_strict_replaces_what_differs_and_keeps_what_does_not(store: LocalBlobs, index: int) -> None:
    differing, equal = (
        orphan(store, index, HOOKS[0], THEIRS),
        orphan(store, index, HOOKS[1], OURS),
    )
    before = {key: store.path(key).stat().st_ino for key in (differing, equal)}
    changed = bytes(store.read(differing))
    with writer(store, is_strict=True) as to:
        write(to, index)
    check_record(store, index, OURS)
    assert store.path(equal).stat().st_ino == before[equal]
    assert bytes(store.read(differing)) != changed
    assert store.names(LEASES) == []


def orphaned_norms(blobs: Blobs, index: int, values: Columns) -> str:
    """Write the shard of norms of a segment that was never committed, and return its key."""
    layout = PLAN.norm_array()
    return put(
        blobs, layout, index, encode(layout, index, side_by_side(PLAN, index, norms(index, values)))
    ).record.key


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("index", [0, LAST])
def test_norms_are_those_of_the_shards_that_are_there(store: LocalBlobs, index: int, is_strict: bool) -> None:
    """An earlier attempt, which had other last bits, ended before its record."""
    for hook in HOOKS:
        orphan(store, index, hook, THEIRS)
    before = bytes(store.read(orphaned_norms(store, index, THEIRS)))
    with writer(store, is_strict=is_strict) as to:
        record = write(to, index)
    check_record(store, index, OURS if is_strict else THEIRS)
    assert record.norms is not None
    assert (bytes(store.read(record.norms.key)) == before) is not is_strict


def test_norms_that_differ_by_rounding_are_adopted(store: LocalBlobs) -> None:
    layout, theirs = PLAN.norm_array(), side_by_side(PLAN, 0, norms(0, OURS))
    theirs[0, 0, 0] = np.nextafter(theirs[0, 0, 0], np.float32(np.inf))
    there = put(store, layout, 0, encode(layout, 0, theirs)).record
    with writer(store) as to:
        assert write(to, 0).norms == there


@pytest.mark.parametrize("is_strict", [False, True])
def test_norms_of_other_values_are_not_adopted(store: LocalBlobs, is_strict: bool) -> None:
    key = orphaned_norms(store, 0, {name: 2 * values for name, values in OURS.items()})
    with writer(store, is_strict=is_strict) as to:
        if is_strict:
            write(to, 0)
            check_record(store, 0, OURS)
            return
        with pytest.raises(StorageError, match=f"/{key} was there before, and holds other norms than"):
            write(to, 0)
    assert store.head(commit_key("0000", 0)) is None


def of_another_model(values: NDArray[Any]) -> NDArray[Any]:
    """Values with only the shape and size of a hook's values."""
    return np.roll(values, 1, axis=1)


@pytest.mark.parametrize("is_conditional", [True, False])
@pytest.mark.parametrize("index", [0, LAST])
def test_shards_that_another_run_has_left_are_not_adopted(
    store: LocalBlobs, index: int, is_conditional: bool
) -> None:
    key = orphan(store, index, HOOKS[1], {HOOKS[1]: of_another_model(OURS[HOOKS[1]])})
    with (
        writer(store, is_conditional=is_conditional) as to,
        pytest.raises(
            StorageError, match=f"/{key} was there before, and holds other values .* choose another out"
        ),
    ):
        write(to, index)
    assert store.head(commit_key("0000", index)) is None


@pytest.mark.parametrize(("share", "is_adopted"), [(0.05, True), (0.2, False)])
def test_a_few_tokens_of_an_adopted_shard_may_differ(
    store: LocalBlobs, share: float, is_adopted: bool
) -> None:
    """Rounding on other hardware sends some tokens of a mixture to another expert."""
    values = THEIRS[HOOKS[0]].copy()
    tokens = values.reshape(-1, *values.shape[2:])  # its first rows are those of segment 0
    n_tokens = PLAN.segment(0).n_sequences * PLAN.context_length
    tokens[: int(share * n_tokens)] *= -1
    orphan(store, 0, HOOKS[0], {HOOKS[0]: values})
    with writer(store) as to:
        if is_adopted:
            write(to, 0)
            check_record(store, 0, OURS | {HOOKS[0]: values})
        else:
            with pytest.raises(StorageError, match="another run has left it"):
                write(to, 0)


def test_a_writer_whose_store_was_deleted_puts_nothing_into_the_next_one(store: LocalBlobs) -> None:
    with writing(store) as held, writer(store, fence=lambda: Turn.of(held).check(store)) as to:
        write(to, 0)
        shutil.rmtree(store.root)
        begin_run(store, PLAN)
        before = bytes_below(store)
        with pytest.raises(BusyError, match="the store was deleted"):
            write(to, 1)
        assert bytes_below(store) == before


@pytest.mark.parametrize("is_strict", [False, True])
def test_who_is_out_of_its_turn_once_its_shards_are_there_commits_nothing(
    store: LocalBlobs, is_strict: bool
) -> None:
    """A repair may have removed shards of the segment meanwhile, since no record names them."""
    good = iter([None])

    def fence() -> None:
        if next(good, "over") == "over":
            raise BusyError("it is another one's turn")

    with (
        writer(store, is_strict=is_strict, fence=fence) as to,
        pytest.raises(BusyError, match="another one's turn"),
    ):
        write(to, 0)
    assert store.head(PLAN.activations(PLAN.request.hooks[0]).key(0)) is not None
    assert store.head(commit_key(PLAN.run, 0)) is None


@pytest.mark.parametrize("is_strict", [False, True])
def test_where_storage_cannot_decide_the_record_is_left_to_the_caller(
    store: LocalBlobs, is_strict: bool
) -> None:
    with writer(store, is_strict=is_strict, is_conditional=False) as to:
        record = write(to, 1)
    assert store.head(commit_key("0000", 1)) is None
    store.create(commit_key("0000", 1), [record.to_bytes()])
    check_record(store, 1, OURS)


class Overwriting(LocalBlobs):
    """Storage that overwrites a key that is created twice."""

    def create(self, key: str, *args: Any, **keywords: Any) -> bool:
        self.delete(key)
        return super().create(key, *args, **keywords)


def test_where_storage_overwrites_the_shards_that_are_there_stay(store: LocalBlobs) -> None:
    before = {key: bytes(store.read(key)) for key in (orphan(store, 1, name, THEIRS) for name in HOOKS)}
    with writer(Overwriting(store.root), is_conditional=False) as to:
        record = write(to, 1)
    assert {shard.key: bytes(store.read(shard.key)) for shard in record.shards.values()} == before
    assert record.statistics == statistics(1, THEIRS)


@pytest.mark.parametrize("is_strict", [False, True])
def test_a_segment_that_is_committed_stays_as_it_is(store: LocalBlobs, is_strict: bool) -> None:
    with writer(store, is_strict=is_strict) as to:
        write(to, 1, THEIRS)
    before = bytes_below(store)
    with writer(store, is_strict=is_strict) as to:
        record = write(to, 1)
    assert bytes_below(store) == before
    assert record.shards == read_commit(store, PLAN, 1).shards


def test_who_waited_for_the_lease_writes_nothing(store: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_POLL_S", 0.01)
    calls = watched(store)
    with writer(calls, is_strict=True) as late, writer(store) as early:
        with lease(store, "0000-00000001"):
            waiting = threading.Thread(target=write, args=(late, 1))
            waiting.start()
            write(early, 1, THEIRS)
        waiting.join()
    changed = calls.of(CHANGES)
    assert changed
    assert {key for key in changed if not key.startswith(LEASES)} == set()
    check_record(store, 1, THEIRS)


@pytest.mark.parametrize("where", ["before the record", "before the deletion of foreign shards"])
def test_who_lost_the_lease_commits_and_deletes_nothing(store: LocalBlobs, where: str) -> None:
    key = f"{LEASES}/0000-00000001.json"
    last = PLAN.activations(PLAN.request.hooks[-1]).key(1)
    foreign = orphan(store, 1, HOOKS[0], THEIRS) if "foreign" in where else None
    before = None if foreign is None else bytes(store.read(foreign))

    def stand_still(name: str, shard: str) -> None:
        """Long enough for another process to take over."""
        if (name, shard) == ("create", last):
            while True:
                info = store.head(key)
                assert info is not None
                taken = LeaseRecord(holder="another", n_renewals=0)
                if store.replace(key, [taken.to_bytes()], expected=info.tag):
                    return

    with (
        writer(watched(store, after=stand_still), is_strict=True) as to,
        pytest.raises(StorageError, match="another process took over"),
    ):
        write(to, 1)
    assert store.head(commit_key("0000", 1)) is None
    assert foreign is None or bytes(store.read(foreign)) == before
    record = LeaseRecord.read(store, key)
    assert record.holder == "another"


class Returning(LocalBlobs):
    """A process without leases puts the same foreign shard back whenever it is deleted."""

    values: Mapping[str, NDArray[Any]] = THEIRS

    def delete(self, key: str) -> None:
        super().delete(key)
        if key.startswith("acts/"):
            orphan(self, 1, HOOKS[0], self.values)


def test_shards_that_keep_coming_back_are_told(store: LocalBlobs) -> None:
    blobs = Returning(store.root)
    orphan(store, 1, HOOKS[0], THEIRS)
    with (
        writer(blobs, is_strict=True) as to,
        pytest.raises(StorageError, match="shards of segment 1 in .* keep coming back from another process"),
    ):
        write(to, 1)
    assert store.head(commit_key("0000", 1)) is None
    assert store.names(LEASES) == []

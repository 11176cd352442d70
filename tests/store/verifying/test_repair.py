"""Repair removes exactly what is damaged and what vouched for it; afterwards the store claims less, never more."""

import contextlib
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from actstore.errors import BusyError
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import Plan
from actstore.store.records.commit import commit_key, commits_folder, plan_key, tokens_key
from actstore.store.records.manifest import MANIFEST_KEY, read_manifest, shards_key, statistics_key
from actstore.store.records.seal import seal, unseal
from actstore.store.verifying.findings import Finding
from actstore.store.verifying.repair import repair
from actstore.store.verifying.token_restore import counts_on
from actstore.tokens import Packing, pack
from tests.storage.watched import CrashError, watched
from tests.store.example import HOOKS, LENGTH, N, write_array
from tests.store.runs import MLP_OUT, bytes_below, hooks_run, write_run
from tests.store.verifying.test_verify import (
    DAMAGE,
    RUN,
    SHARD,
    checked,
    flip,
    make_store,
    permute_tokens,
    point_to,
)

RECORD = commit_key(RUN, 1)
SUMMARY = {shards_key(RUN), statistics_key(RUN)}
SEGMENT = {f"acts/{hook}/c.1.0.0" + ".0" * (hook == HOOKS[2]) for hook in HOOKS}
"""The shards of the second segment."""
TOKENS = {"tokens/c.0.0", "lengths/c.0", "documents/c.0.0", "offsets/c.0.0"}
OF_TOKENS = {tokens_key(RUN)}
OF_SHARD = SUMMARY | {RECORD, SHARD}
OF_RECORD = SUMMARY | {RECORD}
FIRST = {commit_key(RUN, 0), f"acts/{HOOKS[0]}/c.0.0.0"}

REMOVED: dict[str, set[str]] = {
    **dict.fromkeys(
        ("shard missing", "shard short", "shard empty", "shard long", "value flipped", "index flipped"),
        OF_SHARD,
    ),
    "shards swapped": OF_SHARD | FIRST,
    # The table of the run still names its shards.
    **dict.fromkeys(
        ("record missing", "record flipped", "record empty", "record of another segment"), OF_RECORD
    ),
    **dict.fromkeys(
        (
            "other statistics",
            "statistics of no hook",
            "golden sequence where none belongs",
            "other number of tokens",
        ),
        OF_RECORD,
    ),
    **dict.fromkeys(
        ("golden sequence missing", "golden sequence of another segment"), SUMMARY | {commit_key(RUN, 0)}
    ),
    "impossible statistics": OF_SHARD,
    "stray file": {f"{commits_folder(RUN)}/note.txt"},
    "record past the end": {commit_key(RUN, 3)},
    "tokens shard missing": SUMMARY | {tokens_key(RUN), "tokens/c.0.0"},
    "tokens shard flipped": SUMMARY | {tokens_key(RUN), "documents/c.0.0"},
    "tokens in another order": SUMMARY | {tokens_key(RUN), "tokens/c.0.0"},
    "other lengths": SUMMARY | {tokens_key(RUN), "lengths/c.0"},
    **dict.fromkeys(
        ("tokens record missing", "tokens record flipped", "tokens record of nothing"), OF_TOKENS
    ),
    "metadata changed": {f"acts/{HOOKS[0]}/zarr.json"},
    "metadata missing": {"zarr.json"},
    "plan flipped": {plan_key(RUN)},
    "plan missing": {plan_key(RUN)},
    "plan changed": {plan_key(RUN)},
    "manifest flipped": {MANIFEST_KEY},
    **dict.fromkeys(("table flipped", "table missing", "table of other content"), SUMMARY),
    **dict.fromkeys(("statistics flipped", "statistics of other content"), SUMMARY),
}
"""Keys that a repair removes or replaces, including those that were missing."""


@pytest.fixture
def memory() -> Blobs:
    return open_blobs(f"memory://{uuid.uuid4().hex}")


def repaired(blobs: Blobs) -> list[str]:
    check = checked(blobs)
    return repair(blobs, check, check.findings)


@pytest.mark.parametrize("kind", REMOVED)
def test_exactly_what_is_damaged_is_removed(memory: Blobs, kind: str) -> None:
    plan = make_store(memory)
    whole = bytes_below(memory)
    DAMAGE[kind][0](memory, plan)
    damaged = bytes_below(memory)
    removed = repaired(memory)
    there = bytes_below(memory)
    gone = damaged.keys() - there.keys()
    written = {key for key in there if there[key] != damaged.get(key)} - {MANIFEST_KEY}
    assert sorted(removed) == sorted(gone | written)
    assert gone | written == REMOVED[kind] & (damaged.keys() | there.keys())
    # The rest is what an undisturbed run writes.
    assert {key for key in there if there[key] != whole.get(key)} <= {MANIFEST_KEY}
    assert checked(memory).findings == []


@pytest.mark.parametrize(
    "kind",
    [
        "plan flipped",
        "plan missing",
        "plan changed",
        "metadata changed",
        "metadata missing",
        "tokens record missing",
        "tokens record flipped",
        "tokens record of nothing",
        "stray file",
    ],
)
def test_what_needs_no_extraction_leaves_a_sealed_store(memory: Blobs, kind: str) -> None:
    plan = make_store(memory)
    whole = bytes_below(memory)
    DAMAGE[kind][0](memory, plan)
    repaired(memory)
    assert bytes_below(memory) == whole


@pytest.mark.parametrize("kind", ["manifest flipped", "table flipped", "statistics of other content"])
def test_what_records_say_is_summed_up_again(memory: Blobs, kind: str) -> None:
    plan = make_store(memory)
    whole = bytes_below(memory)
    DAMAGE[kind][0](memory, plan)
    repaired(memory)
    seal(memory)
    assert bytes_below(memory) == whole


def test_shards_without_a_record_go_with_any_repair(memory: Blobs) -> None:
    # An extraction would adopt them, and nothing tells whether they are intact.
    make_store(memory, segments=(0, 1, 2), sealed=False)
    memory.delete(RECORD)
    flip(memory, SHARD, 0)
    assert set(repaired(memory)) == SEGMENT
    assert set(checked(memory).committed[RUN]) == {0, 2}


@pytest.mark.parametrize("table", ["there", "damaged", "missing", "of other content"])
def test_shards_of_a_lost_record_stay_only_if_the_table_says_so(memory: Blobs, table: str) -> None:
    plan = make_store(memory)
    flip(memory, RECORD, 200)
    flip(memory, SHARD, 100)
    expected = OF_SHARD if table == "there" else OF_RECORD | SEGMENT
    if table == "damaged":
        flip(memory, shards_key(RUN), 99)
    elif table == "missing":
        DAMAGE["manifest flipped"][0](memory, plan)
        expected |= {MANIFEST_KEY}
    elif table == "of other content":
        point_to(memory, shards_key(RUN), b"PAR1")
    assert set(repaired(memory)) == expected
    assert checked(memory).findings == []


@pytest.mark.parametrize("segments", [(), (0, 1, 2)])
def test_whole_tokens_get_their_record_again(memory: Blobs, segments: tuple[int, ...]) -> None:
    make_store(memory, segments=segments, sealed=False)
    whole = bytes_below(memory)
    memory.delete(tokens_key(RUN))
    assert repaired(memory) == [tokens_key(RUN)]
    assert bytes_below(memory) == whole


UNPROVEN: dict[str, tuple[Callable[[Blobs, Plan], object], set[str]]] = {
    "ids": (lambda b, _: flip(b, "tokens/c.0.0", 7), {"tokens/c.0.0"}),
    "padding of ids": (lambda b, _: flip(b, "tokens/c.0.0", N * LENGTH * 4 + 1), {"tokens/c.0.0"}),
    "index": (lambda b, _: flip(b, "tokens/c.0.0", -5), {"tokens/c.0.0"}),
    "order": (permute_tokens, {"tokens/c.0.0"}),
    "ids missing": (lambda b, _: b.delete("tokens/c.0.0"), set()),
    # Without lengths it is not known which tokens must have a document.
    "lengths": (lambda b, _: flip(b, "lengths/c.0", 0), TOKENS - {"tokens/c.0.0"}),
    "documents": (lambda b, _: flip(b, "documents/c.0.0", 9), {"documents/c.0.0", "offsets/c.0.0"}),
    "offsets": (lambda b, _: flip(b, "offsets/c.0.0", 200), {"documents/c.0.0", "offsets/c.0.0"}),
    "offsets missing": (lambda b, _: b.delete("offsets/c.0.0"), {"documents/c.0.0"}),
}
"""The damage, and the shards that are removed if no record and no table vouches for any."""


@pytest.mark.parametrize("kind", UNPROVEN)
def test_only_tokens_that_nothing_proves_go(memory: Blobs, kind: str) -> None:
    plan = make_store(memory, segments=(), sealed=False)
    damage, expected = UNPROVEN[kind]
    damage(memory, plan)
    memory.delete(tokens_key(RUN))
    assert set(repaired(memory)) == expected
    # A second check finds nothing more, and does not take the rest for intact.
    assert repaired(memory) == []
    assert tokens_key(RUN) not in bytes_below(memory)


def test_the_table_tells_which_token_shards_are_whole(memory: Blobs) -> None:
    make_store(memory)
    flip(memory, "documents/c.0.0", N * LENGTH * 8 + 3)
    memory.delete(tokens_key(RUN))
    assert set(repaired(memory)) == SUMMARY | {"documents/c.0.0"}


@pytest.mark.parametrize(
    ("documents", "offsets", "is_whole"),
    [
        ([3, 3, 3, 3, 4, 4, 4, 4], [5, 6, 7, 8, 0, 1, 2, 3], True),
        ([-1, 3, 3, -1, 5, 5, 5, -1], [-1, 0, 1, -1, 0, 1, 2, -1], True),
        ([3, 3, 3, 3, 4, 4, 4, 4], [5, 6, 7, 8, 9, 1, 2, 3], False),
        ([3, 3, 7, 3, 4, 4, 4, 4], [5, 6, 7, 8, 0, 1, 2, 3], False),
        ([-1, 3, 3, -1, 5, 5, 5, -1], [-1, 0, 1, 2, 0, 1, 2, -1], False),
    ],
)
def test_tokens_of_a_document_count_on(
    memory: Blobs, documents: list[int], offsets: list[int], is_whole: bool
) -> None:
    plan = make_store(memory, segments=(), sealed=False)
    for name, row in (("documents", documents), ("offsets", offsets)):
        layout = plan.token_array(name)
        memory.delete(layout.key(0))
        write_array(memory, layout, np.array([row] * N, "<i8" if name == "documents" else "<i4"), [0])
    memory.delete(tokens_key(RUN))
    assert (repaired(memory) == [tokens_key(RUN)]) == is_whole


PACKINGS = {
    "no tokens put in": Packing(context_length=7),
    "all tokens put in": Packing(context_length=7, begin_batch=1, begin_sequence=2, separator=3),
    "same token everywhere": Packing(context_length=7, begin_batch=1, begin_sequence=1, separator=1),
    "one document a row": Packing(
        mode="document", context_length=7, begin_sequence=2, pad=0, truncate="right"
    ),
    "cut at the left": Packing(mode="document", context_length=7, pad=0, truncate="left", kept=1),
    "empty documents": Packing(
        mode="document", context_length=7, begin_batch=2, pad=0, truncate="left", keeps_empty=True
    ),
}


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_tokens_as_they_are_packed_count_on(packing: Packing) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 5, size=n, dtype=np.int32) for n in rng.integers(0, 20, size=60)]
    (rows,) = pack(enumerate(documents), packing)
    cut = {"are_cut_left": packing.truncate == "left"}
    assert counts_on(rows.documents, rows.offsets, rows.lengths, **cut)
    order = rng.permutation(len(rows))
    assert counts_on(rows.documents[order], rows.offsets[order], rows.lengths[order], **cut)


def test_only_documents_that_were_cut_at_the_left_leave_tokens_out() -> None:
    documents, lengths = np.zeros((1, 4), np.int64), np.array([4], np.int32)
    assert counts_on(documents, np.array([[0, 5, 6, 7]]), lengths, are_cut_left=True)
    assert not counts_on(documents, np.array([[0, 5, 6, 7]]), lengths)
    assert not counts_on(documents, np.array([[0, 5, 6, 8]]), lengths, are_cut_left=True)
    assert not counts_on(documents, np.array([[1, 5, 6, 7]]), lengths, are_cut_left=True)


def test_the_token_before_an_empty_document_is_alone() -> None:
    offsets = np.full((1, 3), -1)
    alone, with_others = np.array([[4, -1, -1]]), np.array([[4, 4, -1]])
    assert counts_on(alone, offsets, np.array([1]))
    assert not counts_on(alone, offsets, np.array([2]))
    assert not counts_on(with_others, offsets, np.array([2]))


@pytest.mark.parametrize("name", ["a\\b.json", "folder/x", "00000001.json/x"])
def test_names_that_are_no_objects_do_not_end_a_repair(local: LocalBlobs, name: str) -> None:
    make_store(local, segments=(0, 2), sealed=False)
    flip(local, f"acts/{HOOKS[0]}/c.2.0.0", 9)
    stray = local.root / commits_folder(RUN) / name
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"x")
    assert set(repaired(local)) == {f"acts/{HOOKS[0]}/c.2.0.0", commit_key(RUN, 2)}
    (finding,) = checked(local).findings
    assert finding.key == f"{commits_folder(RUN)}/{name.split('/')[0]}"
    assert not finding.is_repairable


def test_run_without_a_plan_keeps_what_it_has(memory: Blobs) -> None:
    make_store(memory)
    unseal(memory)
    write_run(memory, hooks_run("0001", MLP_OUT))
    memory.delete(plan_key("0001"))
    flip(memory, SHARD, 100)
    before = {key for key in bytes_below(memory) if "/0001/" in key or MLP_OUT in key}
    assert set(repaired(memory)) == OF_SHARD
    assert before <= bytes_below(memory).keys()


def test_other_files_among_the_shards_stay(memory: Blobs) -> None:
    make_store(memory)
    for name in ("c.1", "c.01.0.0", "c.1.0.0.tmp", "README", "c.99999999999999999999.0.0"):
        memory.create(f"acts/{HOOKS[0]}/{name}", [b"x"])
    memory.create(f"acts/{HOOKS[0]}/c.3.0.0", [b"past the end"])
    assert repaired(memory) == [f"acts/{HOOKS[0]}/c.3.0.0"]


def test_other_runs_keep_their_place_in_the_manifest(memory: Blobs) -> None:
    make_store(memory)
    unseal(memory)
    write_run(memory, hooks_run("0001", MLP_OUT))
    seal(memory)
    whole = bytes_below(memory)
    flip(memory, f"acts/{MLP_OUT}/c.2.0.0", 3)
    removed = repaired(memory)
    assert set(removed) == {
        f"acts/{MLP_OUT}/c.2.0.0",
        commit_key("0001", 2),
        shards_key("0001"),
        statistics_key("0001"),
    }
    manifest = read_manifest(memory)
    assert manifest is not None
    assert ([finished.plan.run for finished in manifest.runs], manifest.sealed) == ([RUN], False)
    assert whole.keys() - bytes_below(memory).keys() == set(removed)


def test_warnings_and_what_cannot_be_made_again_stay(memory: Blobs) -> None:
    make_store(memory, sealed=False)
    before = bytes_below(memory)
    check = checked(memory)
    assert repair(memory, check, [Finding(SHARD, "holds NaN", RUN, 1, severity="warning")]) == []
    assert repair(memory, check, [Finding(plan_key(RUN), "?", RUN, is_repairable=False)]) == []
    assert bytes_below(memory) == before


@pytest.mark.parametrize(
    "kind",
    [
        "value flipped",
        "tokens shard flipped",
        "tokens record flipped",
        "plan flipped",
        "record flipped",
        "metadata changed",
    ],
)
def test_killed_at_any_change_it_can_be_repeated(memory: Blobs, kind: str) -> None:
    """If a repair is killed in between, the store claims less than there is, and never more."""
    plan = make_store(memory)
    whole = bytes_below(memory)
    n_changes = 0
    while True:
        for key in bytes_below(memory):
            memory.delete(key)
        for key, data in whole.items():
            memory.create(key, [data])
        DAMAGE[kind][0](memory, plan)
        check = checked(memory)
        left = n_changes

        def before(call: str, _key: str) -> None:
            nonlocal left
            if call in ("create", "replace", "delete"):
                left -= 1
                if left < 0:
                    raise CrashError

        wrapped: Any = watched(memory, before=before)
        try:
            repair(wrapped, check, check.findings)
        except CrashError:
            n_changes += 1
            repaired(memory)
            assert checked(memory).findings == []
            assert checked(memory).plans == {RUN: plan}
            continue
        break
    assert n_changes >= 2


@pytest.mark.parametrize("kind", ["value flipped", "tokens shard flipped", "plan flipped"])
def test_nothing_is_changed_once_others_may_write(memory: Blobs, kind: str) -> None:
    """The lease of the repair can be lost at any moment; from then on, nothing is removed or written."""
    DAMAGE[kind][0](memory, make_store(memory))
    check = checked(memory)
    for n_good in range(3):
        before, left = bytes_below(memory), iter(range(n_good))

        def fence() -> None:
            if next(left, None) is None:  # noqa: B023
                raise BusyError("it is another one's turn")

        calls = watched(memory)
        with contextlib.suppress(BusyError):
            repair(calls, check, check.findings, fence)
        changed = {key for key in before if bytes_below(memory).get(key) != before[key]}
        assert len(changed) <= n_good
        for key in changed:
            memory.delete(key)
            memory.create(key, [before[key]])


def test_shards_that_get_their_record_meanwhile_stay(memory: Blobs) -> None:
    """A writer of an earlier version, which takes no lease, commits meanwhile."""
    plan = make_store(memory)
    record_key = commit_key(RUN, 1)
    record = bytes(memory.read(record_key))
    for key in (record_key, MANIFEST_KEY, shards_key(RUN), statistics_key(RUN)):
        memory.delete(key)
    shards = {layout.key(1) for layout in plan.segment_arrays()}
    check = checked(memory)

    def before(name: str, key: str) -> None:
        if (name, key) == ("head", record_key) and memory.head(record_key) is None:
            memory.create(record_key, [record])

    removed = repair(watched(memory, before=before), check, check.findings)
    assert not shards & set(removed)
    assert checked(memory).findings == []
    memory.delete(record_key)
    assert set(repaired(memory)) == shards

"""Verify finds nothing in an intact store, and each kind of damage in its place."""

import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import HookArray, Plan
from actstore.store.format.shard import crc32c
from actstore.store.records.commit import (
    CommitRecord,
    Golden,
    ObjectRecord,
    TokensRecord,
    commit_key,
    commits_folder,
    plan_key,
    read_commit,
    tokens_key,
)
from actstore.store.records.manifest import MANIFEST_KEY, Manifest, RunStatistics, shards_key, statistics_key
from actstore.store.records.seal import seal, unseal
from actstore.store.records.shards_table import from_parquet, to_parquet
from actstore.store.verifying.findings import Finding
from actstore.store.verifying.segment_check import count_not_finite
from actstore.store.verifying.verify import Check
from tests.storage.watched import watched
from tests.store.example import (
    HOOKS,
    LENGTH,
    SEGMENT,
    Columns,
    N,
    example_plan,
    example_tokens,
    example_values,
    write_array,
    write_store,
)
from tests.store.runs import ATTN_OUT, MLP_OUT, begin_run, hooks_run, tokens_run, write_run

RUN = "0000"
RESID_0 = HOOKS[0]
SHARD = f"acts/{RESID_0}/c.1.0.0"
"""The shard of the second segment."""

Damage = Callable[[Blobs, Plan], object]
Expected = list[tuple[str, str | None, int | None]]
"""Key, run and segment of each finding."""


def numbers(plan: Plan) -> Columns:
    """Values that are all finite."""
    rng = np.random.default_rng(1)
    columns = {}
    for hook in plan.request.hooks:
        layout = plan.activations(hook)
        values = rng.standard_normal(layout.shape).astype("<f4")
        # The upper half of a float32 is a bfloat16.
        columns[hook.name] = (
            (values.view("<u4") >> 16).astype("<u2") if layout.dtype == "bfloat16" else values
        )
    return columns


def make_store(
    blobs: Blobs, plan: Plan | None = None, segments: Iterable[int] = (0, 1, 2), *, sealed: bool = True
) -> Plan:
    """Write a store of one run."""
    plan = plan or example_plan()
    write_store(blobs, plan, numbers(plan), segments)
    if sealed:
        seal(blobs)
    return plan


def checked(blobs: Blobs) -> Check:
    check = Check(blobs)
    check.run()
    return check


def found_in(blobs: Blobs) -> Expected:
    """Keys, runs and segments of the damage that a check finds."""
    findings = [finding for finding in checked(blobs).findings if finding.severity == "damage"]
    return [(finding.key, finding.run, finding.segment) for finding in findings]


def overwrite(blobs: Blobs, key: str, data: bytes) -> None:
    blobs.delete(key)
    assert blobs.create(key, [data])


def flip(blobs: Blobs, key: str, place: int) -> None:
    """Invert one byte of an object."""
    data = bytearray(bytes(blobs.read(key)))
    data[place] ^= 0xFF
    overwrite(blobs, key, bytes(data))


def change_record(blobs: Blobs, plan: Plan, segment: int, **changes: Any) -> None:
    """Change a record and its checksum."""
    record = read_commit(blobs, plan, segment).model_copy(update=changes)
    overwrite(blobs, commit_key(plan.run, segment), record.to_bytes())


@pytest.fixture
def memory() -> Blobs:
    return open_blobs(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, memory: Blobs) -> Blobs:
    return memory if request.param == "memory" else LocalBlobs(tmp_path / "store")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("norms", [False, True])
def test_whole_store_is_clean(anywhere: Blobs, dtype: str, compression: Any, norms: bool) -> None:
    plan = make_store(anywhere, example_plan(dtype, compression, norms=norms))
    sizes: list[int] = []
    check = Check(anywhere, sizes.append)
    check.run()
    assert check.findings == []
    assert check.is_complete
    assert check.committed == {RUN: [0, 1, 2]}
    # Every object once: 9 shards of activations, 4 of tokens, 3 commit records and the tokens record, 7 arrays and
    # 3 groups, the plan, the manifest and its two files; with norms one more group, array and 3 shards.
    assert check.n_objects == plan.n_objects == len(sizes) == (36 if norms else 31)
    assert check.nbytes == sum(sizes)


def test_segments_without_a_tokens_record_are_work_to_be_done(memory: Blobs) -> None:
    make_store(memory, sealed=False)
    memory.delete(tokens_key(RUN))
    check = checked(memory)
    assert check.findings == []
    assert not check.is_complete


@pytest.mark.parametrize("segments", [(), (1,), (0, 2), (0, 1, 2)])
def test_store_that_grows_is_clean(anywhere: Blobs, segments: tuple[int, ...]) -> None:
    make_store(anywhere, segments=segments, sealed=False)
    check = checked(anywhere)
    assert check.findings == []
    assert check.is_complete == (len(segments) == 3)


def test_store_without_its_tokens_yet_is_clean(memory: Blobs) -> None:
    plan = make_store(memory, segments=(), sealed=False)
    memory.delete(tokens_key(RUN))
    check = checked(memory)
    assert check.findings == []
    assert not check.is_complete
    assert check.plans == {RUN: plan}


def test_run_that_has_only_its_plan_yet_is_clean(memory: Blobs) -> None:
    plan = example_plan()
    memory.create(plan_key(RUN), [plan.to_bytes()])
    assert checked(memory).findings == []
    more = hooks_run("0001", MLP_OUT)
    write_store(memory, plan, numbers(plan), (0, 1, 2))
    memory.create(plan_key("0001"), [more.to_bytes()])
    memory.create(f"acts/{MLP_OUT}/zarr.json", [b"{}"])
    assert found_in(memory) == [(f"acts/{MLP_OUT}/zarr.json", "0001", None)]


def test_shards_that_are_not_committed_are_no_damage(memory: Blobs) -> None:
    plan = make_store(memory, segments=(0, 1, 2), sealed=False)
    memory.delete(commit_key(RUN, 1))
    flip(memory, SHARD, 0)
    assert found_in(memory) == []
    assert not checked(memory).is_complete
    assert checked(memory).plans == {RUN: plan}


def test_several_runs_are_clean_in_every_state(memory: Blobs) -> None:
    make_store(memory)
    unseal(memory)
    assert found_in(memory) == []
    begin_run(memory, hooks_run("0001", MLP_OUT))
    write_run(memory, tokens_run("0002"))
    assert found_in(memory) == []
    seal(memory)
    assert not checked(memory).is_complete
    assert found_in(memory) == []


def test_sealed_store_of_several_runs_is_clean(memory: Blobs) -> None:
    first = make_store(memory)
    more = tokens_run("0001")
    runs = [first, more, hooks_run("0002", MLP_OUT, over=first), hooks_run("0003", ATTN_OUT, over=more)]
    unseal(memory)
    for plan in runs[1:]:
        write_run(memory, plan)
    seal(memory)
    check = checked(memory)
    assert all(finding.severity == "warning" for finding in check.findings)
    assert check.is_complete
    assert list(check.plans) == [plan.run for plan in runs]
    assert check.n_objects == sum(plan.n_objects for plan in runs)


def test_values_that_are_no_numbers_are_a_warning(memory: Blobs) -> None:
    plan = example_plan()
    values = {name: array.copy() for name, array in numbers(plan).items()}
    values[RESID_0][SEGMENT + 3, 2, 5] = np.nan
    values[RESID_0][SEGMENT + 3, 4, 5] = np.inf
    write_store(memory, plan, values, (0, 1, 2))
    seal(memory)
    problem = "holds NaN or infinity in 2 tokens, as the model computed them"
    assert checked(memory).findings == [Finding(SHARD, problem, RUN, 1, severity="warning")]


@pytest.mark.parametrize(
    ("leaf", "value", "is_reported"),
    [
        ("pattern", np.nan, True),
        ("pattern", np.inf, True),
        ("pattern", -np.inf, True),
        ("attn_scores", np.nan, True),
        ("attn_scores", -np.nan, True),
        ("attn_scores", np.inf, True),
        ("attn_scores", -np.inf, False),
        ("attn_scores", np.finfo(np.float16).max, False),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_attention_that_is_no_number_is_a_warning(
    memory: Blobs, dtype: str, leaf: str, value: float, is_reported: bool
) -> None:
    name = f"blocks.0.attn.hook_{leaf}"
    hook = HookArray(name=name, shape=(2, LENGTH), axes=("head", "source_position"))
    plan = example_plan(dtype)
    plan = plan.model_copy(update={"request": plan.request.model_copy(update={"hooks": (hook,)})})
    values = np.zeros((N, LENGTH, 2, LENGTH), "<f4")
    values[SEGMENT + 3, 2, 1, 5] = values[SEGMENT + 3, 2, 0, 4] = values[SEGMENT + 9, 0, 0, 0] = value
    stored = values.astype("<f2") if dtype == "float16" else values
    if dtype == "bfloat16":
        stored = (values.view("<u4") >> 16).astype("<u2")
    write_store(memory, plan, {name: stored}, (0, 1, 2))
    seal(memory)
    problem = "holds NaN or infinity in 2 tokens, as the model computed them"
    expected = [Finding(f"acts/{name}/c.1.0.0.0", problem, RUN, 1, severity="warning")]
    assert checked(memory).findings == (expected if is_reported else [])


def test_attention_of_padding_may_hold_anything() -> None:
    hook = HookArray(name="blocks.0.attn.hook_pattern", shape=(2, 4), axes=("head", "source_position"))
    rows = np.zeros((3, 4, 2, 4), "<f4")
    rows[1, 2:] = np.nan
    assert count_not_finite(hook, rows, "float32", np.array([4, 2, 4]), 2) == 0
    assert count_not_finite(hook, rows, "float32", np.array([4, 3, 4]), 2) == 1


def test_any_bits_at_all_are_clean(memory: Blobs) -> None:
    plan = example_plan("bfloat16")
    write_store(memory, plan, example_values(plan), (0, 1, 2))
    seal(memory)
    assert {finding.severity for finding in checked(memory).findings} == {"warning"}


def cut(blobs: Blobs, key: str, nbytes: int) -> None:
    overwrite(blobs, key, bytes(blobs.read(key))[:nbytes])


def swap(blobs: Blobs) -> None:
    other = f"acts/{RESID_0}/c.0.0.0"
    first, second = bytes(blobs.read(other)), bytes(blobs.read(SHARD))
    overwrite(blobs, other, second)
    overwrite(blobs, SHARD, first)


def replace_record(blobs: Blobs, segment: int, by: int) -> None:
    overwrite(blobs, commit_key(RUN, segment), bytes(blobs.read(commit_key(RUN, by))))


def other_statistics(blobs: Blobs, plan: Plan) -> None:
    right = read_commit(blobs, plan, 1).statistics
    wrong = right[RESID_0].model_copy(update={"sum_of_norms": right[RESID_0].sum_of_norms * 1.001})
    change_record(blobs, plan, 1, statistics=right | {RESID_0: wrong})


def impossible_statistics(blobs: Blobs, plan: Plan) -> None:
    """Write statistics that no values have, and remove their shard, so that they are not compared with the values."""
    right = read_commit(blobs, plan, 1).statistics
    change_record(
        blobs, plan, 1, statistics=right | {RESID_0: right[RESID_0].model_copy(update={"sum": "AAAA"})}
    )
    blobs.delete(SHARD)


def permute_tokens(blobs: Blobs, plan: Plan, name: str = "tokens") -> None:
    """Write the same rows in another order, or other lengths, with the right checksums."""
    values = example_tokens(plan)[name]
    changed = values[::-1].copy() if name == "tokens" else np.r_[values[:-1], values[-1:] - 1]
    layout = plan.token_array(name)
    blobs.delete(layout.key(0))
    (record,) = write_array(blobs, layout, changed, [0])
    tokens = TokensRecord.read(blobs, tokens_key(RUN))
    shards = tuple(record if shard.key == record.key else shard for shard in tokens.shards)
    overwrite(blobs, tokens_key(RUN), TokensRecord(shards=shards).to_bytes())


def of_other_content(blobs: Blobs, key: str) -> None:
    """Replace a file of the manifest by one with other content, and point the manifest to it."""
    data = bytes(blobs.read(key))
    if key.endswith(".parquet"):
        table = from_parquet(data, n_rows=13)
        column = table.schema.get_field_index("crc32c")
        data = to_parquet(
            table.set_column(column, table.schema.field(column), table["crc32c"].take([0] * 13))
        )
    else:
        statistics = RunStatistics.from_bytes(data, key)
        wrong = statistics.hooks[RESID_0].model_copy(update={"max_abs": 0.5})
        data = RunStatistics(hooks=dict(statistics.hooks) | {RESID_0: wrong}).to_bytes()
    point_to(blobs, key, data)


def point_to(blobs: Blobs, key: str, data: bytes) -> None:
    overwrite(blobs, key, data)
    manifest = Manifest.read(blobs, MANIFEST_KEY)
    record = ObjectRecord(key=key, nbytes=len(data), crc32c=crc32c(data))
    field = "shards" if key.endswith(".parquet") else "statistics"
    runs = (manifest.runs[0].model_copy(update={field: record}),)
    overwrite(blobs, MANIFEST_KEY, manifest.model_copy(update={"runs": runs}).to_bytes())


def change_plan(blobs: Blobs, plan: Plan) -> None:
    overwrite(blobs, plan_key(RUN), plan.model_copy(update={"n_documents": 4}).to_bytes())


FIRST_RECORD, RECORD = commit_key(RUN, 0), commit_key(RUN, 1)
LOOK_ALIKE = commit_key(RUN, 1).replace("00000001", "0000000\N{FULLWIDTH DIGIT ONE}")
IN_RUN = (RUN, None)
IN_SEGMENT = (RUN, 1)

DAMAGE: dict[str, tuple[Damage, Expected]] = {
    "shard missing": (lambda b, _: b.delete(SHARD), [(SHARD, *IN_SEGMENT)]),
    "shard short": (lambda b, _: cut(b, SHARD, 1000), [(SHARD, *IN_SEGMENT)]),
    "shard empty": (lambda b, _: cut(b, SHARD, 0), [(SHARD, *IN_SEGMENT)]),
    "shard long": (
        lambda b, _: overwrite(b, SHARD, bytes(b.read(SHARD)) + b"\0"),
        [(SHARD, *IN_SEGMENT)],
    ),
    "value flipped": (lambda b, _: flip(b, SHARD, 100), [(SHARD, *IN_SEGMENT)]),
    "index flipped": (lambda b, _: flip(b, SHARD, -10), [(SHARD, *IN_SEGMENT)]),
    "shards swapped": (
        lambda b, _: swap(b),
        [(f"acts/{RESID_0}/c.0.0.0", RUN, 0), (SHARD, *IN_SEGMENT)],
    ),
    "record missing": (lambda b, _: b.delete(RECORD), [(RECORD, *IN_SEGMENT)]),
    "record flipped": (lambda b, _: flip(b, RECORD, 200), [(RECORD, *IN_SEGMENT)]),
    "record empty": (lambda b, _: cut(b, RECORD, 0), [(RECORD, *IN_SEGMENT)]),
    "record of another segment": (lambda b, _: replace_record(b, 1, 0), [(RECORD, *IN_SEGMENT)]),
    "other statistics": (other_statistics, [(RECORD, *IN_SEGMENT)]),
    "impossible statistics": (impossible_statistics, [(RECORD, *IN_SEGMENT), (SHARD, *IN_SEGMENT)]),
    "statistics of no hook": (
        lambda b, p: change_record(b, p, 1, statistics={}),
        [(RECORD, *IN_SEGMENT)],
    ),
    "golden sequence missing": (lambda b, p: change_record(b, p, 0, golden=None), [(FIRST_RECORD, RUN, 0)]),
    "golden sequence of another segment": (
        lambda b, p: change_record(b, p, 0, golden=Golden(sequence=p.segment(1).start, errors={})),
        [(FIRST_RECORD, RUN, 0)],
    ),
    "golden sequence where none belongs": (
        lambda b, p: change_record(b, p, 1, golden=Golden(sequence=p.segment(1).start, errors={})),
        [(RECORD, *IN_SEGMENT)],
    ),
    "other number of tokens": (lambda b, p: change_record(b, p, 1, n_tokens=7), [(RECORD, *IN_SEGMENT)]),
    "stray file": (
        lambda b, _: b.create(f"{commits_folder(RUN)}/note.txt", [b"x"]),
        [(f"{commits_folder(RUN)}/note.txt", *IN_RUN)],
    ),
    "record past the end": (
        lambda b, _: b.create(commit_key(RUN, 3), [bytes(b.read(commit_key(RUN, 2)))]),
        [(commit_key(RUN, 3), *IN_RUN)],
    ),
    "record in other digits": (
        lambda b, _: b.create(LOOK_ALIKE, [b"{}"]),
        [(LOOK_ALIKE, *IN_RUN)],
    ),
    "tokens shard missing": (lambda b, _: b.delete("tokens/c.0.0"), [("tokens/c.0.0", *IN_RUN)]),
    "tokens shard flipped": (lambda b, _: flip(b, "documents/c.0.0", 9), [("documents/c.0.0", *IN_RUN)]),
    "lengths flipped": (lambda b, _: flip(b, "lengths/c.0", 9), [("lengths/c.0", *IN_RUN)]),
    "padding of tokens flipped": (
        lambda b, _: flip(b, "tokens/c.0.0", N * LENGTH * 4 + 1),
        [("tokens/c.0.0", *IN_RUN)],
    ),
    "tokens in another order": (permute_tokens, [("tokens/c.0.0", *IN_RUN)]),
    "other lengths": (lambda b, p: permute_tokens(b, p, "lengths"), [("lengths/c.0", *IN_RUN)]),
    "tokens record missing": (lambda b, _: b.delete(tokens_key(RUN)), [(tokens_key(RUN), *IN_RUN)]),
    "tokens record flipped": (lambda b, _: flip(b, tokens_key(RUN), 99), [(tokens_key(RUN), *IN_RUN)]),
    "tokens record of nothing": (
        lambda b, _: overwrite(b, tokens_key(RUN), TokensRecord(shards=()).to_bytes()),
        [(tokens_key(RUN), *IN_RUN)],
    ),
    "metadata changed": (
        lambda b, _: flip(b, f"acts/{RESID_0}/zarr.json", 30),
        [(f"acts/{RESID_0}/zarr.json", *IN_RUN)],
    ),
    "metadata missing": (lambda b, _: b.delete("zarr.json"), [("zarr.json", *IN_RUN)]),
    "plan flipped": (lambda b, _: flip(b, plan_key(RUN), 99), [(plan_key(RUN), *IN_RUN)]),
    "plan missing": (lambda b, _: b.delete(plan_key(RUN)), [(plan_key(RUN), *IN_RUN)]),
    "plan changed": (change_plan, [(plan_key(RUN), *IN_RUN)]),
    "manifest flipped": (lambda b, _: flip(b, MANIFEST_KEY, 99), [(MANIFEST_KEY, None, None)]),
    "table flipped": (lambda b, _: flip(b, shards_key(RUN), 99), [(shards_key(RUN), *IN_RUN)]),
    "table missing": (lambda b, _: b.delete(shards_key(RUN)), [(shards_key(RUN), *IN_RUN)]),
    "table of other content": (
        lambda b, _: of_other_content(b, shards_key(RUN)),
        [(shards_key(RUN), *IN_RUN)],
    ),
    "table of no table": (
        lambda b, _: point_to(b, shards_key(RUN), b"PAR1"),
        [(shards_key(RUN), *IN_RUN)],
    ),
    "statistics flipped": (lambda b, _: flip(b, statistics_key(RUN), 99), [(statistics_key(RUN), *IN_RUN)]),
    "statistics of other content": (
        lambda b, _: of_other_content(b, statistics_key(RUN)),
        [(statistics_key(RUN), *IN_RUN)],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_where_it_is(memory: Blobs, kind: str) -> None:
    plan = make_store(memory)
    damage, expected = DAMAGE[kind]
    damage(memory, plan)
    assert found_in(memory) == expected


OF_SHARDS = ("shard missing", "shard short", "value flipped", "index flipped", "shards swapped")


@pytest.mark.parametrize("kind", OF_SHARDS)
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_damage_of_compressed_shards(memory: Blobs, kind: str, compression: Any) -> None:
    plan = make_store(memory, example_plan("bfloat16", compression))
    damage, expected = DAMAGE[kind]
    damage(memory, plan)
    assert found_in(memory) == expected


@pytest.mark.parametrize("kind", [*OF_SHARDS, "record flipped", "tokens record missing", "metadata missing"])
def test_damage_of_files(local: LocalBlobs, kind: str) -> None:
    plan = make_store(local)
    damage, expected = DAMAGE[kind]
    damage(local, plan)
    assert found_in(local) == expected


@pytest.mark.parametrize("kind", [*OF_SHARDS, "record flipped", "tokens shard flipped"])
def test_damage_of_a_growing_store(memory: Blobs, kind: str) -> None:
    plan = make_store(memory, segments=(0, 1), sealed=False)
    damage, expected = DAMAGE[kind]
    damage(memory, plan)
    assert found_in(memory) == expected


def test_all_damage_is_told_at_once(memory: Blobs) -> None:
    plan = make_store(memory)
    for kind in ("shard missing", "tokens shard flipped", "metadata missing", "table flipped"):
        DAMAGE[kind][0](memory, plan)
    flip(memory, commit_key(RUN, 2), 200)
    assert found_in(memory) == [
        (shards_key(RUN), *IN_RUN),
        ("documents/c.0.0", *IN_RUN),
        ("zarr.json", *IN_RUN),
        (SHARD, *IN_SEGMENT),
        (commit_key(RUN, 2), RUN, 2),
    ]


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("shard missing", f"damage: {SHARD} is missing"),
        ("shard short", f"damage: {SHARD} has 1000 bytes where 8212 were committed"),
        ("record flipped", f"damage: {RECORD} is damaged: it"),
        ("record of another segment", f"damage: {RECORD} is damaged: it is of segment 0 with 16 sequences"),
        (
            "other statistics",
            f"damage: {RECORD} has other statistics of {RESID_0} than its values: sum_of_norms",
        ),
        ("plan missing", f"damage: {plan_key(RUN)} is missing"),
        ("manifest flipped", f"damage: {MANIFEST_KEY} is damaged"),
    ],
)
@pytest.mark.parametrize("folder", ["store", "a folder with spaces"])
def test_a_finding_is_one_sentence(tmp_path: Path, folder: str, kind: str, sentence: str) -> None:
    blobs = LocalBlobs(tmp_path / folder)
    plan = make_store(blobs)
    DAMAGE[kind][0](blobs, plan)
    (finding,) = checked(blobs).findings
    assert str(finding).startswith(sentence)
    assert str(tmp_path) not in str(finding)


def test_damage_of_a_further_run_is_in_that_run(memory: Blobs) -> None:
    make_store(memory)
    unseal(memory)
    write_run(memory, hooks_run("0001", MLP_OUT))
    write_run(memory, tokens_run("0002"))
    memory.delete("parts/0002/lengths/c.0")
    seal(memory)
    flip(memory, f"acts/{MLP_OUT}/c.2.0.0", 3)
    memory.delete("zarr.json")
    assert found_in(memory) == [
        ("zarr.json", RUN, None),
        (f"acts/{MLP_OUT}/c.2.0.0", "0001", 2),
        ("parts/0002/lengths/c.0", "0002", None),
    ]


def test_run_that_the_sealed_manifest_does_not_name(memory: Blobs) -> None:
    make_store(memory)
    begin_run(memory, hooks_run("0001", MLP_OUT))
    assert found_in(memory) == [(MANIFEST_KEY, None, None)]


def test_run_that_begins_during_the_check_is_no_damage(memory: Blobs) -> None:
    """A new run writes its plan, and changes the manifest a moment later."""
    make_store(memory)
    more = hooks_run("0001", MLP_OUT)
    begin_run(memory, more)
    n_reads = 0

    def before(call: str, key: str) -> None:
        nonlocal n_reads
        n_reads += (call, key) == ("read", MANIFEST_KEY)
        if n_reads == 1 and call == "names":
            unseal(memory)

    check = checked(watched(memory, before=before))
    assert check.findings == []
    assert check.plans["0001"] == more


@pytest.mark.parametrize("left", ["commits", "tokens", "summary"])
@pytest.mark.parametrize("run", ["0000", "0001"])
def test_run_that_has_lost_its_plan(anywhere: Blobs, run: str, left: str) -> None:
    if run == "0001":
        make_store(anywhere)
        unseal(anywhere)
    key = {"commits": commit_key(run, 1), "tokens": tokens_key(run), "summary": shards_key(run)}[left]
    anywhere.create(key, [b"{}"])
    (finding,) = checked(anywhere).findings
    assert (finding.key, finding.run, finding.is_repairable) == (plan_key(run), run, False)
    assert f"delete _actstore/runs/{run} and the arrays of that run" in finding.problem


def test_empty_folder_of_a_run_is_none(local: LocalBlobs) -> None:
    make_store(local)
    (local.root / commits_folder("0001")).mkdir(parents=True)
    assert checked(local).findings == []


def test_plan_without_a_copy_cannot_be_repaired(memory: Blobs) -> None:
    make_store(memory, sealed=False)
    flip(memory, plan_key(RUN), 99)
    (finding,) = checked(memory).findings
    assert (finding.key, finding.is_repairable) == (plan_key(RUN), False)


def test_first_plan_missing(memory: Blobs) -> None:
    make_store(memory, sealed=False)
    begin_run(memory, hooks_run("0001", MLP_OUT))
    memory.delete(plan_key(RUN))
    (finding,) = checked(memory).findings
    assert (finding.key, finding.is_repairable) == (plan_key(RUN), False)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"n_sequences": 38}, "has another n_sequences than run 0000, over whose tokens it is"),
        ({"tokens_sha256": "1" * 64}, "has another tokens_sha256 than run 0000"),
        ({"tokens_of": "0001"}, "is over the tokens of run 0001, which is missing"),
    ],
)
def test_plans_that_contradict_each_other(memory: Blobs, change: dict[str, Any], problem: str) -> None:
    make_store(memory, sealed=False)
    plan = hooks_run("0002", MLP_OUT, **change)
    memory.create(plan_key(plan.run), [plan.to_bytes()])
    (finding,) = checked(memory).findings
    assert (finding.key, finding.run, finding.is_repairable) == (plan_key(plan.run), plan.run, False)
    assert finding.problem.startswith(problem)


def test_hook_that_is_there_twice(memory: Blobs) -> None:
    make_store(memory, sealed=False)
    plan = hooks_run("0001", RESID_0)
    memory.create(plan_key(plan.run), [plan.to_bytes()])
    (finding,) = checked(memory).findings
    assert finding.problem == f"has {RESID_0}, which an earlier run has over the same tokens"


def test_record_is_read_once(memory: Blobs) -> None:
    plan = make_store(memory)
    record = CommitRecord.read(memory, RECORD)
    # A document in another form was not written by this format, whatever its checksum.
    body = record.to_bytes().replace(b'"segment": 1', b'"segment":  1')
    head, rest = body.split(b"\n", 2)[0], body.split(b"\n", 2)[2]
    overwrite(memory, RECORD, head + b'\n  "checksum": %d,\n' % crc32c(rest) + rest)
    (finding,) = checked(memory).findings
    assert (finding.key, finding.problem) == (RECORD, "is not in the canonical form of this format")
    assert plan.run == RUN

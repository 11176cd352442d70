"""The manifest: a finished store opens with one small read, and no run is ever lost."""

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.errors import NotCommittedError, StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import Plan
from actstore.store.records.commit import ObjectRecord
from actstore.store.records.manifest import (
    MANIFEST_KEY,
    FinishedRun,
    Manifest,
    read_manifest,
    shards_key,
    statistics_key,
    update_manifest,
)
from actstore.store.records.seal import seal, unseal
from tests.commands import Conversation
from tests.storage.watched import CHANGES, LISTINGS, READS, WatchedBlobs, watched
from tests.store.arrays import bits
from tests.store.example import HOOKS, SEGMENT, N, commit_segment, example_plan, example_values
from tests.store.runs import ATTN_OUT, MLP_OUT, begin_run, hooks_run, tokens_run, write_run

RUNS = {
    "one run": (example_plan(),),
    "three runs": (example_plan(), hooks_run("0001", MLP_OUT, ATTN_OUT), tokens_run("0002")),
}
N_WRITERS, N_EACH = 4, 5


def finished(run: str) -> FinishedRun:
    plan = hooks_run(run, f"blocks.0.hook_h{run}") if run != "0000" else example_plan()
    return FinishedRun(
        plan=plan,
        shards=ObjectRecord(key=shards_key(run), nbytes=1, crc32c=1),
        statistics=ObjectRecord(key=statistics_key(run), nbytes=1, crc32c=1),
    )


def add(blobs: Blobs, run: str) -> None:
    def change(manifest: Manifest) -> Manifest:
        runs = {entry.plan.run: entry for entry in manifest.runs} | {run: finished(run)}
        return Manifest(sealed=False, runs=tuple(runs[name] for name in sorted(runs)))

    update_manifest(blobs, change)


def names_in(blobs: Blobs) -> list[str]:
    manifest = read_manifest(blobs)
    assert manifest is not None
    return [entry.plan.run for entry in manifest.runs]


def open_watched(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> tuple[actstore.Store, WatchedBlobs]:
    calls = WatchedBlobs(blobs)
    monkeypatch.setattr("actstore.opening.open_blobs", lambda url: calls)
    return actstore.open(blobs.url), calls


@pytest.mark.parametrize("plans", RUNS.values(), ids=RUNS.keys())
def test_a_sealed_store_opens_with_one_read_and_no_listing(
    blobs: Blobs, plans: tuple[Plan, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for plan in plans:
        write_run(blobs, plan)
    seal(blobs)
    store, watched = open_watched(blobs, monkeypatch)
    assert watched.calls == [("read", MANIFEST_KEY)]
    assert store.is_complete
    assert len(store.hooks) == sum(len(plan.hook_names) for plan in plans if plan.run != "0002")
    store[HOOKS[0]][20]
    assert watched.of(LISTINGS) == []
    assert len(watched.of(READS)) == 2  # the second read is the row


def test_statistics_of_a_sealed_store_are_one_more_read_a_run(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for plan in RUNS["three runs"]:
        write_run(blobs, plan)
    seal(blobs)
    store, watched = open_watched(blobs, monkeypatch)
    for hook, runs in ((MLP_OUT, ["0001"]), (HOOKS[0], ["0000", "0002"])):
        watched.calls.clear()
        store.stats(hook)
        assert watched.calls == [("read", statistics_key(run)) for run in runs]


def test_a_growing_store_shows_what_is_committed_and_nothing_else(blobs: Blobs) -> None:
    first = example_plan()
    before = write_run(blobs, first)
    seal(blobs)
    second = hooks_run("0001", MLP_OUT)
    unseal(blobs)
    begin_run(blobs, second)
    values = example_values(second)
    store = actstore.open(blobs.url)
    assert MLP_OUT in store
    for done in ([], [1], [1, 0], [1, 0, 2]):
        if done:
            commit_segment(blobs, second, done[-1], values)
            store.refresh()
        expected = np.zeros(N, bool)
        for index in done:
            segment = second.segment(index)
            expected[segment.start : segment.stop] = True
        np.testing.assert_array_equal(store.committed_rows(), expected)
        for row in (0, SEGMENT, N - 1):
            if expected[row]:
                np.testing.assert_array_equal(bits(store[MLP_OUT][row]), bits(values[MLP_OUT][row]))
            else:
                with pytest.raises(NotCommittedError, match="run the extraction again"):
                    store[MLP_OUT][row]
            np.testing.assert_array_equal(bits(store[HOOKS[0]][row]), bits(before[HOOKS[0]][row]))
        assert store.is_complete == (len(done) == 3)


def test_a_change_is_made_again_if_somebody_was_faster(blobs: Blobs) -> None:
    seen: list[int] = []

    def change(manifest: Manifest) -> Manifest:
        seen.append(len(manifest.runs))
        if len(seen) < 3:
            add(blobs, f"{len(seen):04d}")
        return Manifest(sealed=False, runs=(finished("0000"), *manifest.runs))

    update_manifest(blobs, change)
    assert seen == [0, 1, 2]
    assert names_in(blobs) == ["0000", "0001", "0002"]


def test_nothing_is_written_where_nothing_changes(blobs: Blobs) -> None:
    add(blobs, "0000")
    calls: Any = WatchedBlobs(blobs)
    add(calls, "0000")
    assert calls.of(CHANGES) == []


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_threads_that_add_runs_at_once_lose_none(kind: str, tmp_path: Path) -> None:
    url = str(tmp_path / "store") if kind == "local" else f"memory://{tmp_path.name}"
    go = threading.Barrier(N_WRITERS)
    torn: list[Exception] = []

    def work(writer: int) -> None:
        blobs = open_blobs(url)
        go.wait()
        for turn in range(N_EACH):
            add(blobs, f"{writer * N_EACH + turn:04d}")

    def read() -> None:
        # Once there is a manifest, there always is a complete one.
        blobs, is_there = open_blobs(url), False
        while any(thread.is_alive() for thread in threads):
            try:
                manifest = read_manifest(blobs)
                assert manifest is not None or not is_there
                is_there = manifest is not None
            except Exception as error:  # noqa: BLE001 - told by the main thread
                torn.append(error)
                return

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(N_WRITERS)]
    for thread in threads:
        thread.start()
    reader = threading.Thread(target=read)
    reader.start()
    for thread in (*threads, reader):
        thread.join()
    assert torn == []
    assert names_in(open_blobs(url)) == [f"{i:04d}" for i in range(N_WRITERS * N_EACH)]


WRITER = """
import sys
from actstore.storage.opening import open_blobs
from tests.store.records.test_manifest import N_EACH, add
blobs = open_blobs(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(N_EACH):
    add(blobs, f"{int(sys.argv[2]) * N_EACH + turn:04d}")
"""


def test_processes_that_add_runs_at_once_lose_none(local: LocalBlobs) -> None:
    writers = [Conversation(local.url, str(i), code=WRITER) for i in range(2)]
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.end)
        assert [writer.answer() for writer in writers] == ["ready"] * 2
        for writer in writers:
            writer.say("go")
        assert [writer.wait(60) for writer in writers] == [0, 0]
    assert names_in(local) == [f"{i:04d}" for i in range(2 * N_EACH)]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((finished("0001"), finished("0000")), "not in order, each once"),
        ((finished("0000"), finished("0000")), "not in order, each once"),
    ],
    ids=["order", "twice"],
)
def test_a_manifest_that_contradicts_itself_is_damage(
    local: LocalBlobs, runs: tuple[FinishedRun, ...], message: str
) -> None:
    local.create(MANIFEST_KEY, [Manifest.model_construct(sealed=True, runs=runs).to_bytes()])
    with pytest.raises(StorageError, match=message):
        actstore.open(local.url)


def test_a_manifest_that_names_files_of_another_run_is_damage(local: LocalBlobs) -> None:
    entry = finished("0000").model_copy(update={"statistics": finished("0001").statistics})
    local.create(MANIFEST_KEY, [Manifest.model_construct(sealed=True, runs=(entry,)).to_bytes()])
    with pytest.raises(StorageError, match="names files that are not its own"):
        actstore.open(local.url)


def test_a_manifest_of_which_bits_changed_is_damage(local: LocalBlobs) -> None:
    write_run(local, example_plan())
    seal(local)
    path = local.path(MANIFEST_KEY)
    path.write_bytes(path.read_bytes().replace(b'"sealed": true', b'"sealed": fals'))
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        actstore.open(local.url)


def test_a_run_that_is_added_between_content_and_tag_stays(blobs: Blobs) -> None:
    """The run is added after the first of the two requests, whichever comes first."""
    add(blobs, "0001")
    n_calls = 0

    def after(_name: str, key: str) -> None:
        nonlocal n_calls
        n_calls += key == MANIFEST_KEY
        if n_calls == 1:
            n_calls += 1
            add(blobs, "0002")

    add(watched(blobs, after=after), "0003")
    assert names_in(blobs) == ["0001", "0002", "0003"]


@pytest.mark.parametrize("n_runs", [0, 1, 3])
def test_a_manifest_is_written_as_every_other_document(tmp_path: Path, n_runs: int) -> None:
    """The texts of its runs are made once and put together; the bytes are those of the whole in one go."""
    manifest = Manifest(sealed=True, runs=tuple(finished(f"{number:04d}") for number in range(n_runs)))
    fields = manifest.model_dump(mode="json")
    body = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    for _ in range(2):
        data = manifest.to_bytes()
        head, _, rest = data.decode().partition(",\n")
        assert head.startswith('{\n  "checksum": ')
        assert "{\n" + rest == body
        assert Manifest.from_bytes(data, "here") == manifest
    larger = Manifest(sealed=False, runs=(*manifest.runs, finished("0007")))
    assert Manifest.from_bytes(larger.to_bytes(), "here") == larger


def test_a_manifest_is_parsed_once_and_another_one_anew(tmp_path: Path) -> None:
    blobs = LocalBlobs(str(tmp_path))
    add(blobs, "0000")
    first = read_manifest(blobs)
    assert first is not None
    assert read_manifest(LocalBlobs(str(tmp_path))) is first
    add(blobs, "0001")
    second = read_manifest(blobs)
    assert second is not None
    assert [entry.plan.run for entry in second.runs] == ["0000", "0001"]
    assert second.runs[0] is first.runs[0]  # nothing of it is parsed or written out again
    data = Path(tmp_path, MANIFEST_KEY).read_bytes()
    Path(tmp_path, MANIFEST_KEY).write_bytes(data.replace(b'"nbytes": 1', b'"nbytes": 2', 1))
    with pytest.raises(StorageError, match="its checksum is"):
        read_manifest(blobs)

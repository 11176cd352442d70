"""What lasts when power is cut: the order of the calls that write, sync and name every object."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import CommitRecord, TokensRecord, commits_folder, tokens_key
from actstore.store.records.manifest import MANIFEST_KEY, shards_key, statistics_key
from tests.storage.power_cut import Disk, Recorder, Step


def told(steps: list[Step], root: Path) -> list[str]:
    """Each step in words, with the random part of names left out."""

    def name(path: Path) -> str:
        return re.sub(r"\.[0-9a-f]{32}", "", path.relative_to(root).as_posix())

    return [f"{step.call} {name(step.path)}" for step in steps]


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    (tmp_path / "root").mkdir()
    return LocalBlobs(tmp_path / "root")


CREATED = ["open _actstore/partial/c", "write _actstore/partial/c", "fsync _actstore/partial/c"]


def recorded(local: LocalBlobs, work: Any) -> list[str]:
    with Recorder(local.root).recording() as recorder:
        work()
    return told(recorder.steps, local.root)


def test_bytes_then_name_then_folder(local: LocalBlobs) -> None:
    local.create("a/b/other", [b"x"])
    local.create("_actstore/partial-is-there", [b"x"])
    (local.root / "_actstore/partial").mkdir(exist_ok=True)
    assert recorded(local, lambda: local.create("a/b/c", [b"1", b"2"])) == [
        "open _actstore/partial/c",
        "write _actstore/partial/c",
        "write _actstore/partial/c",
        "fsync _actstore/partial/c",
        "link a/b/c",
        "fsync a/b",
    ]


def test_new_folders_from_the_top(local: LocalBlobs) -> None:
    steps = recorded(local, lambda: local.create("a/b/c", [b"1"]))
    assert steps[:4] == ["mkdir a", "fsync .", "mkdir a/b", "fsync a"]
    assert steps[-5:] == [*CREATED, "link a/b/c", "fsync a/b"]


def test_bytes_that_go_past_the_cache(local: LocalBlobs) -> None:
    """What is written in whole pages, straight from memory, is still only in the disk's own cache."""
    whole = np.zeros((3 << 20) + 100, np.uint8)
    start = -whole.ctypes.data % 4096
    large = whole[start : start + (2 << 20) + 50]
    steps = recorded(local, lambda: local.create("c", [large, b"end"]))
    writes = [step for step in steps if step.startswith("write")]
    assert steps[-len(writes) - 3 :] == [*writes, "fsync _actstore/partial/c", "link c", "fsync ."]


def test_a_name_that_another_process_gave_is_made_to_last(local: LocalBlobs) -> None:
    """That one may have been killed just before, and whoever adopts the blob vouches for it."""
    local.create("a/c", [b"1"])
    assert recorded(local, lambda: local.create("a/c", [b"2"])) == ["fsync a"]


def test_replacing(local: LocalBlobs) -> None:
    local.create("a/c", [b"1"])
    info = local.head("a/c")
    assert info is not None
    steps = recorded(local, lambda: local.replace("a/c", [b"2"], expected=info.tag))
    steps = [step for step in steps if not step.startswith(("mkdir", "open _actstore/partial/lock"))]
    assert steps[-5:] == [*CREATED, "replace a/c", "fsync a"]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, text_file: Path
) -> tuple[Path, list[Step]]:
    """A store of two runs, the second of which added a hook, and all calls that made it."""
    root = tmp_path_factory.mktemp("power")
    fields: dict[str, Any] = {
        "model": str(tiny_model("llama")),
        "tokens": str(text_file),
        "context_length": 32,
        "max_tokens": 40 * 32,
        "batch_size": 8,
        "segment_size": 16,
        "out": str(root / "store"),
    }
    with Recorder(root).recording() as recorder:
        actstore.extract(actstore.plan(**fields, hooks=["blocks.0.hook_resid_post"]))
        actstore.extract(actstore.plan(**fields, hooks=["blocks.1.attn.hook_z"]))
    return root, recorder.steps


def test_all_that_a_run_leaves_lasts(run: tuple[Path, list[Step]]) -> None:
    root, steps = run
    disk = Disk(root)
    for step in steps:
        disk.apply(step)
    objects = [path for path in (root / "store").rglob("*") if path.is_file()]
    assert len(objects) > 40
    assert [path for path in objects if not disk.lasts(path)] == []


def test_nothing_has_a_name_before_its_bytes_last(run: tuple[Path, list[Step]]) -> None:
    root, steps = run
    disk, n_named = Disk(root), 0
    for step in steps:
        if step.call in ("link", "replace"):
            assert step.source is not None
            assert disk.is_whole(step.source), step.path
            n_named += 1
        disk.apply(step)
    assert n_named > 40


def test_what_vouches_has_no_name_before_what_it_vouches_for_lasts(run: tuple[Path, list[Step]]) -> None:
    """Records of tokens and of segments for their shards; the manifest for all records of a run, and its two files."""
    root, steps = run
    blobs = LocalBlobs(root / "store")
    vouching = {f"{commits_folder(name)}/": CommitRecord for name in ("0000", "0001")}
    disk, n_checked, n_manifests = Disk(root), 0, 0
    for step in steps:
        key = step.path.relative_to(blobs.root).as_posix() if step.path.is_relative_to(blobs.root) else ""
        needed: list[str] = []
        if step.call in ("link", "replace"):
            if key == tokens_key("0000"):
                needed = [shard.key for shard in TokensRecord.read(blobs, key).shards]
            elif any(key.startswith(folder) for folder in vouching):
                record = CommitRecord.read(blobs, key)
                needed = [shard.key for shard in (*record.shards.values(), record.norms) if shard is not None]
            elif key == MANIFEST_KEY:
                # That of the first run; the same, which says that another one begins; that of both.
                n_manifests += 1
                names = ("0000",) if n_manifests < 3 else ("0000", "0001")
                needed = [shards_key(name) for name in names] + [statistics_key(name) for name in names]
                needed += [
                    f"{commits_folder(name)}/{segment:08d}.json" for name in names for segment in range(3)
                ]
        missing = [one for one in needed if not disk.lasts(blobs.root / one)]
        assert missing == [], key
        n_checked += bool(needed)
        disk.apply(step)
    assert n_manifests == 3
    assert n_checked == 1 + 2 * 3 + n_manifests

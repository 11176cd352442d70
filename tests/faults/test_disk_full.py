"""A disk that fills up in the middle of a run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import actstore
from tests.faults.child import Child, run
from tests.faults.conftest import MakeFields, Undisturbed
from tests.faults.finished import check_finished

DISK_NBYTES = 6 << 20
IN_NAMESPACE = "ACTSTORE_TEST_IN_NAMESPACE"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_NBYTES}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Make a file that takes all space but ``leave`` bytes."""
    state = os.statvfs(disk)
    other = disk / "other"
    other.write_bytes(bytes(state.f_bavail * state.f_frsize - leave))
    return other


# Of the 2.7 MB that the store needs, 1.1 MB are tokens and 0.8 MB the three segments that are under way at once.
@pytest.mark.parametrize("leave", [0, 24 << 10, 600 << 10, 1400 << 10, 2200 << 10])
def test_a_full_disk(
    make_fields: MakeFields, undisturbed: Undisturbed, disk: Path, tmp_path: Path, leave: int
) -> None:
    fields = make_fields(disk / "store")
    expected = undisturbed(fields)
    child = Child(fields, stop="planned")
    child.reached()
    other = fill(disk, leave)
    child.go()
    outcome = child.outcome()
    assert outcome.error.startswith(f"DiskFullError: {disk}/store/")
    assert outcome.error.endswith(
        "the disk is full; free some space and run the same command again, it goes on from what is committed"
    )
    whole = make_fields(tmp_path / "whole")
    run(whole)
    if (disk / "store/_actstore/runs/0000/plan.json").exists():
        check_committed(fields["out"], whole["out"], is_some=leave >= 2200 << 10)
    other.unlink()
    run(fields)
    check_finished(fields["out"], expected)


def check_committed(url: str, whole: str, *, is_some: bool) -> None:
    """Check that all that a store reports as committed is there and right."""
    store, expected = actstore.open(url), actstore.open(whole)
    rows = np.flatnonzero(store.committed_rows())
    assert not store.is_complete
    assert len(rows) > 0 or not is_some
    for hook in store.hooks:
        for start in rows[::16]:
            assert np.array_equal(
                store[hook].numpy(slice(start, start + 1)), expected[hook].numpy(slice(start, start + 1))
            )


@pytest.mark.skipif(
    os.geteuid() == 0 or IN_NAMESPACE in os.environ, reason="root may mount file systems itself"
)
def test_all_of_this_in_a_namespace_where_we_are_root() -> None:
    command = ["unshare", "-rm", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, IN_NAMESPACE: "1"}
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"no namespaces on this machine: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout

"""Blobs on the local disk: what is particular to files."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError, check_writable
from actstore.store.local import PARTIAL, LocalBlobs

NOBODY = 65_534


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder that this process may read but not write; root becomes nobody for a while."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "there").write_bytes(b"there")
        (folder / "closed").write_bytes(b"closed")
        (folder / "closed").chmod(0)
        folder.chmod(0o555)
        if is_root:
            os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_no_permission_to_write(foreign: Path) -> None:
    blobs = LocalBlobs(foreign)
    assert bytes(blobs.read("there")) == b"there"
    with pytest.raises(StorageError) as caught:
        check_writable(blobs)
    message = str(caught.value)
    assert message.startswith(f"{foreign}/_actstore/probe/")
    assert message.endswith("cannot be written: no permission; choose a folder that this user may write")


def test_no_permission_to_read(foreign: Path) -> None:
    with pytest.raises(StorageError, match="closed cannot be read: no permission"):
        LocalBlobs(foreign).read("closed")


def test_file_in_the_place_of_a_folder(local: LocalBlobs) -> None:
    local.create("a", [b"file"])
    with pytest.raises(StorageError, match="a/b cannot be written: a file is where a folder is needed"):
        local.create("a/b", [b"x"])
    with pytest.raises(StorageError, match="a/b cannot be read: a file is where a folder is needed"):
        local.read("a/b")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody can make folders")
def test_place_where_no_folder_can_be_made() -> None:
    with pytest.raises(StorageError, match="/proc/run/a cannot be written: ") as caught:
        LocalBlobs("/proc/run").create("a", [b"x"])
    assert not isinstance(caught.value, BlobNotFoundError)


def test_file_system_without_hard_links(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_args: object, **_options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))  # what vfat answers

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError) as caught:
        local.create("a", [b"x"])
    assert str(caught.value) == (
        f"{local.url}/a cannot be created: this file system has no hard links, which create-only writes need; "
        "use a local disk, NFS, or object storage"
    )
    assert local.names(PARTIAL) == []


def test_full_disk_leaves_nothing_behind(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    # A disk cannot be filled here; this is what the kernel says of a full one, in the middle of a file.
    written: list[int] = []

    def full(descriptor: int, data: Any) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(descriptor, data[:3]))
        return written[0]

    write = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="a cannot be written: the disk is full; free some space"):
        local.create("a", [b"0123456789"])
    monkeypatch.undo()
    assert written == [3]
    assert local.size("a") is None
    assert local.names(PARTIAL) == []
    assert local.create("a", [b"0123456789"])


def test_nothing_but_blobs_is_left(local: LocalBlobs) -> None:
    local.create("a/b", [b"x"])
    local.create("a/b", [b"y"])
    check_writable(local)
    assert [path for path in local.root.rglob("*") if path.is_file()] == [local.root / "a/b"]
    local.delete("a/b")
    assert not (local.root / "a").exists()


def test_free_space_is_that_of_the_disk(tmp_path: Path) -> None:
    assert LocalBlobs(tmp_path / "not" / "yet").free_nbytes() == pytest.approx(
        os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.05
    )


def test_reading_past_the_start_is_damage(local: LocalBlobs) -> None:
    local.create("a", [b"0123456789"])
    with pytest.raises(StorageError, match="a has 10 bytes where 80 were expected; the file is damaged"):
        local.read("a", 80)

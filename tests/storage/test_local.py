"""Blobs on the local disk: what is particular to files."""

import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.errors import StorageError
from actstore.storage.blobs import BlobNotFoundError
from actstore.storage.durable import locked
from actstore.storage.local import LOCK, LocalBlobs
from actstore.storage.partial_files import PARTIAL
from actstore.storage.probing import probe

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
        probe(blobs)
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
    assert local.head("a") is None
    assert local.names(PARTIAL) == []
    assert local.create("a", [b"0123456789"])


def test_nothing_but_blobs_is_left(local: LocalBlobs) -> None:
    local.create("a/b", [b"x"])
    local.create("a/b", [b"y"])
    probe(local)
    assert [path for path in local.root.rglob("*") if path.is_file()] == [local.root / "a/b"]
    local.delete("a/b")
    assert not (local.root / "a").exists()


def test_free_space_is_that_of_the_disk(tmp_path: Path) -> None:
    assert LocalBlobs(tmp_path / "not" / "yet").free_nbytes() == pytest.approx(
        os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.05
    )


def test_reading_past_the_start_is_damage(local: LocalBlobs) -> None:
    local.create("a", [b"0123456789"])
    with pytest.raises(StorageError, match="a has 10 bytes where 80 were expected; it is damaged"):
        local.read("a", 80)


# Lost replies of NFS, and cleaners.


def test_link_that_was_made_though_it_failed_is_ours(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*args: Any, **options: Any) -> None:
        real(*args, **options)
        raise FileExistsError(
            errno.EEXIST, os.strerror(errno.EEXIST)
        )  # the repeated request finds the first's

    real = os.link
    monkeypatch.setattr(os, "link", link)
    assert local.create("a", [b"ours"]) is True
    monkeypatch.undo()
    assert bytes(local.read("a")) == b"ours"
    assert local.names(PARTIAL) == []


def test_partial_file_that_was_cleaned_up_is_written_again(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cleaned_up(*args: Any, **options: Any) -> None:
        monkeypatch.undo()
        (partial,) = local.names(PARTIAL)
        local.delete(f"{PARTIAL}/{partial}")
        os.link(*args, **options)

    monkeypatch.setattr(os, "link", cleaned_up)
    assert local.create("a", [b"0123456789"]) is True
    assert bytes(local.read("a")) == b"0123456789"


def test_replace_survives_a_cleaner(local: LocalBlobs) -> None:
    local.create("a", [b"0"])
    replaced = threading.Semaphore(0)

    def clean() -> None:
        for _ in range(40):
            replaced.acquire()  # while the other writers are at work
            for name in local.names(PARTIAL):
                local.delete(f"{PARTIAL}/{name}")

    def count() -> None:
        for _ in range(10):
            is_done = False
            while not is_done:
                info = local.head("a")
                assert info is not None
                more = str(int(bytes(local.read("a"))) + 1).encode()
                is_done = local.replace("a", [more], expected=info.tag)
            replaced.release()

    threads = [threading.Thread(target=clean), *(threading.Thread(target=count) for _ in range(4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bytes(local.read("a")) == b"40"  # no count was lost


def test_lock_of_a_killed_process_locks_nothing_and_goes(local: LocalBlobs) -> None:
    local.create("a", [b"old"])
    lock = local.path(LOCK)
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    info = local.head("a")
    assert info is not None
    assert local.replace("a", [b"new"], expected=info.tag)
    assert not lock.exists()


def test_held_lock_is_not_deleted(local: LocalBlobs) -> None:
    lock = local.path(LOCK)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        local.delete(LOCK)
        assert lock.exists()
    local.delete(LOCK)
    assert not lock.exists()


def test_links_to_other_places_are_followed(local: LocalBlobs, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "there").write_bytes(b"there")
    local.root.mkdir()
    local.path("disk").symlink_to(tmp_path / "other")
    assert bytes(local.read("disk/there")) == b"there"
    assert local.create("disk/new", [b"new"])
    assert local.sizes("disk") == {"there": 5, "new": 3}


def test_read_of_more_than_one_call_gives(local: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel gives at most 2 GiB at once.
    data = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)
    local.create("a", [data])
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, place: real(fd, [buffers[0][:999]], place))
    out = np.zeros(9_000, np.uint8)
    local.read_into("a", 500, out)
    assert np.array_equal(out, data[500:9_500])


def test_of_two_who_replace_at_once_one_is_told_so(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one comes between the first look and the lock."""
    local.create("a", [b"old"])
    info = local.head("a")
    assert info is not None
    real = os.fsync

    def other_first(descriptor: int) -> None:
        monkeypatch.undo()
        assert LocalBlobs(local.root).replace("a", [b"theirs"], expected=info.tag)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", other_first)
    assert not local.replace("a", [b"ours"], expected=info.tag)
    assert bytes(local.read("a")) == b"theirs"


def test_a_lock_that_was_removed_while_it_was_waited_for_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was in has removed the file, and the next one makes and locks another."""
    path = tmp_path / "lock"
    real, asked, is_named = fcntl.flock, threading.Event(), list[bool]()

    def flock(descriptor: int, how: int) -> None:
        if threading.current_thread() is thread:
            asked.set()
        real(descriptor, how)

    def wait() -> None:
        with locked(path):
            is_named.append(path.exists())

    monkeypatch.setattr(fcntl, "flock", flock)
    thread = threading.Thread(target=wait)
    with locked(path):
        thread.start()
        assert asked.wait(60)
    thread.join()
    assert is_named == [True]
    assert not path.exists()


@pytest.mark.parametrize("nbytes", [1000, 2 << 20], ids=["read", "mapped"])
def test_a_file_that_is_too_short_is_damaged(local: LocalBlobs, nbytes: int) -> None:
    """However it is read: of pages behind the end of a file, looking at them would end the process."""
    local.create("a", [bytes(nbytes)])
    os.truncate(local.path("a"), nbytes - 1)
    told = rf"a has {nbytes - 1} bytes where {nbytes} were expected; it is damaged"
    with pytest.raises(StorageError, match=told):
        local.read("a", 0, nbytes)
    with pytest.raises(StorageError, match=told):
        local.read_into("a", 0, np.empty(nbytes, np.uint8))
    assert len(local.read("a", 0, nbytes - 1)) == nbytes - 1

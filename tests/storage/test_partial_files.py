"""Partial files where folders of a store lie on other disks, and names on file systems without hard links."""

import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actstore.errors import StorageError
from actstore.storage.local import LocalBlobs
from actstore.storage.partial_files import PARTIAL
from actstore.storage.probing import probe
from actstore.store.format.layout import PAGE
from actstore.store.records.seal import remove_scratch
from tests.commands import command
from tests.storage.file_systems import another_disk, without_links
from tests.storage.race import N_RACERS, racers

BIG = b"x" * (4 * PAGE)


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[LocalBlobs]:
    """A root whose folder ``acts`` is a link to another disk."""
    with another_disk(tmp_path) as disk:
        blobs = LocalBlobs(tmp_path / "root")
        blobs.root.mkdir()
        (blobs.root / "acts").symlink_to(disk)
        yield blobs


def files_below(folder: Path) -> list[str]:
    """The paths of all files below a folder; links are followed."""
    walk = os.walk(folder, followlinks=True)
    return sorted(f"{place}/{name}".removeprefix(f"{folder}/") for place, _, names in walk for name in names)


def test_folder_on_another_disk_is_written_create_only(linked: LocalBlobs) -> None:
    assert linked.create("acts/hook/c.0", [BIG])
    assert not linked.create("acts/hook/c.0", [b"other"])
    assert bytes(linked.read("acts/hook/c.0")) == BIG
    found = linked.head("acts/hook/c.0")
    assert found is not None
    assert linked.replace("acts/hook/c.0", [b"new"], expected=found.tag)
    assert not linked.replace("acts/hook/c.0", [b"newer"], expected=found.tag)
    assert bytes(linked.read("acts/hook/c.0")) == b"new"
    assert linked.create("here", [b"x"])
    assert files_below(linked.root) == ["acts/hook/c.0", "here"]


def test_other_disk_that_looks_like_this_one(linked: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    # Bind mounts have one device number, and no links across.
    monkeypatch.setattr("actstore.storage.partial_files._device", lambda _: 1)
    for name in "ab":
        assert linked.create(f"acts/{name}", [BIG])
    assert files_below(linked.root) == ["acts/a", "acts/b"]


def test_files_on_another_disk_are_whole_or_not_there(
    linked: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = os.link

    def looked_at(*args: object, **options: object) -> None:
        seen.append(linked.names("acts"))
        real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", looked_at)
    assert linked.create("acts/c.0", [BIG, BIG])
    assert seen == [[]]  # what is partial is in no listing
    assert linked.sizes("acts") == {"c.0": 2 * len(BIG)}


_WRITER = """
import os, sys
from actstore.storage.local import LocalBlobs
os.link = lambda *_, **__: os._exit(137)
LocalBlobs(sys.argv[1]).create("acts/c.0", [b"x" * 16384])
"""


def test_what_a_killed_writer_left_on_another_disk_is_cleaned_up(linked: LocalBlobs) -> None:
    assert command(linked.url, code=_WRITER).returncode == 137
    left = files_below(linked.root)
    assert [name.split("/")[0] for name in left] == ["_actstore", "acts"]
    assert linked.names("acts") == []
    remove_scratch(linked)
    assert files_below(linked.root) == []
    assert linked.create("acts/c.0", [b"whole"])


@pytest.mark.parametrize(
    "text", ["acts/c.0", "../outside", "/etc/hostname", "acts/../../.x.partial", "", "\0", "\xff"]
)
def test_note_that_somebody_else_wrote_removes_nothing_else(linked: LocalBlobs, text: str) -> None:
    linked.create("acts/c.0", [b"x"])
    (linked.root.parent / "outside").write_bytes(b"x")
    (linked.root.parent / ".x.partial").write_bytes(b"x")
    note = f"{PARTIAL}/a.elsewhere"
    assert linked.create(note, [text.encode("latin-1")])
    linked.delete(note)
    assert files_below(linked.root.parent) == [".x.partial", "outside", "root/acts/c.0"]


def test_cleaners_beside_writers_on_another_disk(linked: LocalBlobs) -> None:
    is_done = threading.Event()

    def clean() -> None:
        while not is_done.is_set():
            remove_scratch(linked)

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for i in range(100):
            assert linked.create(f"acts/c.{i}", [BIG])
    finally:
        is_done.set()
        cleaner.join()
    assert linked.sizes("acts") == {f"c.{i}": len(BIG) for i in range(100)}


def test_free_space_is_that_of_the_disk_of_activations(linked: LocalBlobs) -> None:
    assert linked.free_nbytes() == pytest.approx(shutil.disk_usage(linked.root / "acts").free, rel=0.05)


@pytest.mark.parametrize("folder", ["acts", "acts/hook", "_actstore"])
def test_link_to_a_disk_that_is_not_mounted(tmp_path: Path, folder: str) -> None:
    blobs = LocalBlobs(tmp_path / "root")
    link = blobs.root / folder
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "none")
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        probe(blobs)
    assert time.monotonic() - started < 5
    assert str(caught.value) == (
        f"{link} is a link to {tmp_path}/none, which is not there; mount that disk, or remove the link"
    )


@pytest.mark.parametrize("link", ["notes", "acts/notes"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_links_of_the_user_beside_a_store_are_left_alone(tmp_path: Path, link: str, target: str) -> None:
    """Whatever they lead to; but in a folder of the store, folders are the store's."""
    blobs = LocalBlobs(tmp_path / "root")
    linked = tmp_path / "mine"
    if target == "file":
        linked.write_text("mine")
    if target == "folder":
        linked.mkdir()
        before = linked.stat().st_mtime_ns
    path = blobs.root / link
    path.parent.mkdir(parents=True)
    path.symlink_to(linked)
    if link == "acts/notes" and target == "nothing":
        return  # of a disk that is not mounted: see above
    assert probe(blobs)
    assert path.is_symlink()
    assert not (blobs.root / "_actstore").exists()
    if target == "folder" and link == "notes":
        assert linked.stat().st_mtime_ns == before


def refuse_links(monkeypatch: pytest.MonkeyPatch, error: int, below: Path | None = None) -> None:
    real = os.link

    def link(source: str, target: Path, **options: object) -> None:
        if below is None or Path(target).is_relative_to(below):
            raise OSError(error, os.strerror(error))
        real(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize(
    "error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK], ids=errno.errorcode.get
)
def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    refuse_links(monkeypatch, error)
    blobs = LocalBlobs(tmp_path / "root")
    assert blobs.create("a", [BIG])
    real = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda path: path != blobs.path("a") and real(path)
    )  # it comes just then
    assert not blobs.create("a", [b"other"])
    monkeypatch.undo()
    assert bytes(blobs.read("a")) == BIG
    assert files_below(blobs.root) == ["a"]


def test_processes_on_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_links(tmp_path, monkeypatch, error=errno.EPERM)
    with racers(str(tmp_path / "root"), are_new=True) as race:
        for i in range(5):
            assert sorted(race.run(f"create c.{i}")) == ["False"] * (N_RACERS - 1) + ["True"]
        assert race.run("probe") == ["True"] * N_RACERS
    blobs = LocalBlobs(tmp_path / "root")
    assert files_below(blobs.root) == [f"c.{i}" for i in range(5)]
    written = [bytes(blobs.read(key)) for key in blobs.names("")]
    assert all(body == body[:1] * 100_000 + b"." for body in written)


@pytest.mark.parametrize("is_linked", [False, True])
def test_file_system_that_can_neither_link_nor_refuse_a_name(
    linked: LocalBlobs, monkeypatch: pytest.MonkeyPatch, is_linked: bool
) -> None:
    refuse_links(monkeypatch, errno.EPERM, linked.root / "acts" if is_linked else None)
    monkeypatch.setattr("actstore.storage.durable._RENAME_NOREPLACE", 1 << 30)  # a flag that no kernel knows
    with pytest.raises(StorageError) as caught:
        probe(linked)
    assert str(caught.value).startswith(f"{linked.url}/acts/.probe.")
    assert str(caught.value).endswith(
        "cannot be created: this file system has neither hard links nor renames that refuse a taken name, and "
        "create-only writes need one of them; use a local disk, NFS, or object storage"
    )
    monkeypatch.undo()
    assert probe(linked)
    assert files_below(linked.root) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="root becomes nobody, who may not write some folder")
def test_other_disk_that_may_not_be_written() -> None:
    with tempfile.TemporaryDirectory() as name, another_disk(Path(name)) as disk:
        Path(name).chmod(0o777)
        disk.chmod(0o555)
        Path(name, "acts").symlink_to(disk)
        os.seteuid(65_534)
        try:
            with pytest.raises(
                StorageError, match="acts cannot be written: no permission; choose a folder that"
            ):
                probe(LocalBlobs(name))
        finally:
            os.seteuid(0)
        assert list(Path(name).iterdir()) == [Path(name, "acts")]

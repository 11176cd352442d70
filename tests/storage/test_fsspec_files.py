"""Blobs on fsspec file systems that cannot check a condition themselves."""

import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from actstore.errors import StorageError
from actstore.storage import retries
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs
from actstore.storage.probing import probe
from actstore.store.records.seal import remove_scratch
from actstore.testing.blobs import BlobsConformance
from tests.storage.watched import CrashError
from tests.store.runs import bytes_below


class Shelf(MemoryFileSystem):  # type: ignore[misc]
    """Another scheme, whose files other processes could write too; requests fail as told."""

    protocol = "shelf"
    errors: list[Exception] = []  # noqa: RUF012 - fsspec makes the instances

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        assert not options  # it knows no modes
        self._fail()
        super().pipe_file(path, value)

    def cat_file(self, path: str, **options: Any) -> bytes:
        self._fail()
        data: bytes = super().cat_file(path, **options)
        return data

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture
def shelf() -> Iterator[Blobs]:
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    yield open_blobs(f"shelf://{uuid.uuid4().hex}")
    Shelf.errors.clear()


class TestConformance(BlobsConformance):
    @pytest.fixture
    def blobs(self, shelf: Blobs) -> Blobs:
        return shelf


def test_probe_does_not_trust_looking_first(shelf: Blobs) -> None:
    assert shelf.is_emulated
    assert probe(shelf) is False


def test_broken_connections_are_retried(shelf: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    Shelf.errors += [ConnectionResetError("reset"), TimeoutError("late")]
    assert shelf.create("a", [b"x"])
    Shelf.errors += [BrokenPipeError("pipe")]
    assert bytes(shelf.read("a")) == b"x"
    assert shelf.n_retries == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("no"), "a cannot be written: access denied to these credentials (no)"),
        (NotImplementedError("read only"), "a cannot be written: read only"),
        (OSError("odd"), "a cannot be written: odd"),
    ],
)
def test_final_failures_are_explained(shelf: Blobs, error: Exception, message: str) -> None:
    Shelf.errors += [error]
    with pytest.raises(StorageError) as caught:
        shelf.create("a", [b"x"])
    assert str(caught.value) == f"{shelf.url}/{message}"
    assert shelf.n_retries == 0


class Mover(MemoryFileSystem):  # type: ignore[misc]
    """A scheme with a move, as SFTP, SMB and WebHDFS have it; a writer can be killed half way through a file."""

    protocol = "mover"
    cachable = False
    taken = "replaced"
    dies = False
    is_dead = False

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        assert not options  # it knows no modes
        self._check()
        Mover.is_dead = Mover.dies
        super().pipe_file(path, value[: len(value) // 2] if Mover.dies else value)
        self._check()

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        self._check()
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if target in self.store and Mover.taken != "replaced":
            if Mover.taken == "raised":
                raise OSError("name is taken")
            return
        self.store[target] = self.store.pop(source)

    def rm_file(self, path: str) -> None:
        self._check()
        super().rm_file(path)

    def _check(self) -> None:
        if Mover.is_dead:
            raise CrashError


@pytest.fixture(params=["replaced", "raised", "ignored"])
def mover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Blobs:
    """Storage of each kind, by what it does when a file is moved to a taken name."""
    fsspec.register_implementation("mover", Mover, clobber=True)
    monkeypatch.setattr(Mover, "taken", request.param)
    return open_blobs(f"mover://{uuid.uuid4().hex}")


@pytest.fixture
def death(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The next writer is killed half way."""
    monkeypatch.setattr(Mover, "is_dead", False)
    monkeypatch.setattr(Mover, "dies", True)
    return monkeypatch


class TestConformanceWithMove(BlobsConformance):
    @pytest.fixture
    def blobs(self, mover: Blobs) -> Blobs:
        return mover

    def test_readers_see_the_old_content_or_the_new(self, blobs: Blobs) -> None:
        if Mover.taken != "replaced":
            pytest.skip("there is a moment between removal and move, as the class says")
        super().test_readers_see_the_old_content_or_the_new(blobs)


def test_writes_leave_no_partial_file(mover: Blobs) -> None:
    assert mover.create("a/b", [b"one"])
    info = mover.head("a/b")
    assert info is not None
    assert mover.replace("a/b", [b"two"], expected=info.tag)
    assert bytes_below(mover) == {"a/b": b"two"}


def test_a_killed_writer_leaves_no_half_blob(mover: Blobs, death: pytest.MonkeyPatch) -> None:
    with pytest.raises(CrashError):
        mover.create("a/b", [b"0123456789"])
    death.setattr(Mover, "is_dead", False)
    death.setattr(Mover, "dies", False)
    assert mover.head("a/b") is None
    assert list(bytes_below(mover).values()) == [b"01234"]
    assert mover.create("a/b", [b"whole"])
    remove_scratch(mover)
    assert bytes_below(mover) == {"a/b": b"whole"}


def test_a_killed_replacement_leaves_the_old_blob(mover: Blobs, death: pytest.MonkeyPatch) -> None:
    death.setattr(Mover, "dies", False)
    assert mover.create("a", [b"old"])
    info = mover.head("a")
    assert info is not None
    death.setattr(Mover, "dies", True)
    with pytest.raises(CrashError):
        mover.replace("a", [b"0123456789"], expected=info.tag)
    death.setattr(Mover, "is_dead", False)
    assert bytes(mover.read("a")) == b"old"


def test_a_name_taken_during_the_write_is_kept(mover: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    if Mover.taken == "replaced":
        pytest.skip("such storage cannot tell, as `is_emulated` says")
    write = Mover.pipe_file

    def slow(fs: Mover, path: str, value: bytes, **options: Any) -> None:
        write(fs, path, value, **options)
        MemoryFileSystem.pipe_file(fs, f"{path.split('/_actstore/')[0]}/a", b"theirs")

    monkeypatch.setattr(Mover, "pipe_file", slow)
    assert not mover.create("a", [b"ours"])
    assert bytes_below(mover) == {"a": b"theirs"}


def test_a_folder_is_no_place_for_a_blob(mover: Blobs) -> None:
    assert mover.create("a/b", [b"x"])
    with pytest.raises(StorageError, match="/a cannot be written: a folder is in its place"):
        mover.create("a", [b"y"])
    assert bytes_below(mover) == {"a/b": b"x"}


def test_a_partial_file_that_was_cleaned_up_is_written_again(
    mover: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    move = Mover.mv

    def late(fs: Mover, path1: str, path2: str, **options: Any) -> None:
        monkeypatch.setattr(Mover, "mv", move)
        remove_scratch(mover)
        raise FileNotFoundError(path1)

    monkeypatch.setattr(Mover, "mv", late)
    assert mover.create("a", [b"x"])
    assert mover.n_retries == 1
    assert bytes_below(mover) == {"a": b"x"}

"""Blobs on fsspec file systems that cannot check a condition themselves."""

import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from actstore.errors import StorageError
from actstore.store import retries
from actstore.store.blobs import Blobs, open_blobs, probe
from actstore.testing.blobs import BlobsConformance


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

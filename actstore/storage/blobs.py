"""The few operations that a store needs of storage: conditional writes, ranged reads, listings, deletion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.storage.errors import BlobNotFoundError

__all__ = [
    "ATTEMPT",
    "BlobInfo",
    "BlobNotFoundError",
    "BlobReader",
    "Blobs",
    "Bytes",
    "Distant",
    "FileReader",
    "are_files",
    "check_key",
    "view",
]

Bytes = bytes | NDArray[np.uint8]
"""Bytes that can be written without a copy."""


def view(part: Bytes) -> memoryview:
    """The same memory as a view of bytes, which files and sockets take."""
    return memoryview(part if isinstance(part, bytes) else part.data).cast("B")


ATTEMPT: Final = "actstore-attempt"
"""Name of the metadata of every object on S3 with the id of the call that wrote it, by which a call recognizes its own
object.
"""


@dataclass(frozen=True)
class BlobInfo:
    """Size, tags and metadata of a blob, which storage knows without reading it."""

    nbytes: int
    tag: str
    """A string that changes when other content replaces the content. On S3 it is the ETag, which equal content may
    share; for files, inode, time of change and size."""
    metadata: Mapping[str, str]
    """The metadata given to `Blobs.create`, where storage keeps it; on S3 also `ATTEMPT`. Empty on a file system."""
    lasting_tag: str = ""
    """Time of change and size of a file. It leaves out the inode, which some mounts make up anew, and which differs in
    a copy that keeps the times and takes the place of the file. Empty for all other storage.
    """


class BlobReader(Protocol):
    """Reads named byte strings below one URL. Keys must pass `check_key`. Threads may share one; a forked process must
    open its own.
    """

    @property
    def url(self) -> str: ...

    @property
    def n_retries(self) -> int:
        """Number of requests repeated so far after a transient failure."""
        ...

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """Read bytes ``start:start + nbytes`` of a blob, or all from ``start`` on.

        Raises:
            BlobNotFoundError: there is no such blob.
            StorageError: the blob ends before these bytes do, or could not be read.
        """
        ...

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` with bytes ``start:start + len(out)`` of a blob.

        Args:
            key: key of the blob.
            start: first byte.
            out: contiguous array [nbytes]; its content is undefined after an error.

        Raises:
            BlobNotFoundError: there is no such blob.
            StorageError: the blob ends before these bytes do, or could not be read.
        """
        ...

    def head(self, key: str) -> BlobInfo | None:
        """Size, tag and metadata of a blob; None if there is no such blob."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether blobs are files of this machine, which makes this a `FileReader`.

        Reading files takes no requests, and large ranges are views of mapped pages. It needs no threads or connections,
        so a forked process may go on reading. An error concerns one file rather than the storage.
        """
        ...

    def signed(self, key: str, seconds: int) -> str | None:
        """A URL from which anybody can GET a blob, with or without a range, for so many seconds, or until the
        credentials that sign it expire; None where storage has no such URLs.

        Raises:
            StorageError: there are no credentials.
        """
        ...


class FileReader(BlobReader, Protocol):
    """Blobs that are files of this machine. `are_files` tells whether a `BlobReader` is one."""

    def path(self, key: str) -> Path:
        """The path of a blob's file, whether it exists or not; for an empty key, the folder of all blobs."""
        ...

    def descriptor(self, key: str) -> int:
        """Open the file of a blob for reading and return its descriptor, which the caller closes.

        Raises:
            OSError: the file cannot be opened.
        """
        ...

    def read_and_head(self, key: str) -> tuple[Bytes, BlobInfo]:
        """All bytes of a small blob, and its `head`, of the same file even if another file takes its name meanwhile.

        Raises:
            BlobNotFoundError: there is no such blob.
            StorageError: the blob could not be read.
        """
        ...

    def check_version(self) -> None:
        """Check that all files opened by `descriptor` until now belong to the version that the blobs are pinned to.

        Raises:
            StoreReplacedError: one of them may not.
        """
        ...


def are_files(blobs: BlobReader) -> TypeGuard[FileReader]:
    """Whether blobs are files that can be opened and mapped. It is `BlobReader.is_local` in a form that type checkers
    understand.
    """
    return blobs.is_local


class Blobs(BlobReader, Protocol):
    """Reads and writes named byte strings below one URL."""

    @property
    def is_emulated(self) -> bool:
        """Whether a condition is checked by a request before the write, since storage has no conditional writes.

        `create` of the same blob can then return True in two processes.
        """
        ...

    def create(self, key: str, parts: Sequence[Bytes], *, metadata: Mapping[str, str] | None = None) -> bool:
        """Write a new blob, whole or not at all; it is durable when this returns.

        Args:
            key: key of the blob.
            parts: content of the blob, written one after the other.
            metadata: text in ASCII with names in lower case, kept with the blob where storage can.

        Returns:
            False if another call created a blob of this key, which is left untouched. A call whose reply got lost
            recognizes its own blob and returns True.

        Raises:
            StorageError: no permission, no space, no credentials, no such bucket, not reachable.
        """
        ...

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:
        """Put new content in the place of the blob whose tag is ``expected``, atomically; durable when this returns.

        Readers get either all of the old content or all of the new.

        Returns:
            False if the blob has another tag or is gone; then nothing was changed.

        Raises:
            StorageError: as for `create`.
        """
        ...

    def names(self, prefix: str) -> list[str]:
        """Names of files and folders directly below ``prefix/``, sorted; empty if there are none.

        An empty ``prefix`` stands for the root.
        """
        ...

    def sizes(self, prefix: str) -> dict[str, int]:
        """Sizes in bytes of the files directly below ``prefix/``, by name, from one listing."""
        ...

    def delete(self, key: str) -> None:
        """Remove a blob; it is no error if there is none."""
        ...

    def free_nbytes(self) -> int | None:
        """Free space in bytes; None where storage does not know it."""
        ...

    def probe_folders(self) -> None:
        """Check that blobs can be written in every folder where keys may lead, before there is work to lose.

        Raises:
            StorageError: a folder cannot be written.
        """
        ...


class Distant:
    """Base class of blobs that are not files of this machine and have no signed URLs."""

    is_local = False

    def signed(self, key: str, seconds: int) -> str | None:  # noqa: ARG002
        """Implements `BlobReader.signed`; these blobs have no such URLs."""
        return None

    def probe_folders(self) -> None:
        """Implements `Blobs.probe_folders`; there is only one place, which `probe` tries."""


def check_key(key: str) -> str:
    """Return the key, if it stays below the root: parts joined by ``/``, none of them empty, ``.`` or ``..``.

    Raises:
        StorageError: it does not, or has a backslash or NUL, which have another meaning on some file systems.
    """
    if any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or "\0" in key:
        raise StorageError(
            f"{key!r} is no key of a blob; expected names joined by '/' that stay below the root, as 'a/b'"
        )
    return key

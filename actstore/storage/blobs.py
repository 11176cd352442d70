"""The little that a store asks of storage: conditional writes, ranged reads, listings, deletion."""

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
"""What can be written as it lies in memory."""


def view(part: Bytes) -> memoryview:
    """The same memory, as what files and sockets take."""
    return memoryview(part if isinstance(part, bytes) else part.data).cast("B")


ATTEMPT: Final = "actstore-attempt"
"""Metadata of every object on S3: the id of the call that wrote it, by which that call knows its own object again."""


@dataclass(frozen=True)
class BlobInfo:
    """What storage knows of one blob without reading it."""

    nbytes: int
    tag: str
    """Another one whenever the content was replaced by other content. S3: the ETag, which equal content may share;
    files: inode, time of change and size."""
    metadata: Mapping[str, str]
    """What `Blobs.create` was given, where storage keeps it; on S3 also `ATTEMPT`. Empty on a file system."""
    lasting_tag: str = ""
    """Of files: time of change and size, without the inode, which some mounts make up anew, and which a copy with its
    times in the place of the file changes. Empty elsewhere.
    """


class BlobReader(Protocol):
    """Named byte strings below one URL. Keys are as `check_key` wants them. Threads may share one; a forked process
    must open its own.
    """

    @property
    def url(self) -> str: ...

    @property
    def n_retries(self) -> int:
        """Requests repeated so far after a transient failure."""
        ...

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """Bytes ``start:start + nbytes`` of a blob, or all from ``start`` on.

        Raises:
            BlobNotFoundError: there is no such blob.
            StorageError: it is shorter than asked for, or could not be read.
        """
        ...

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` with bytes ``start:start + len(out)`` of a blob.

        Args:
            key: of the blob.
            start: first byte.
            out: contiguous [nbytes]; its content is undefined after an error.

        Raises:
            BlobNotFoundError: there is no such blob.
            StorageError: it is shorter than asked for, or could not be read.
        """
        ...

    def head(self, key: str) -> BlobInfo | None:
        """Size and tag of a blob; None if there is none."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether blobs are files of this machine, which makes this a `FileReader`.

        To read them takes no requests, large ranges are views of pages that are mapped, no threads or connections are
        needed, so that a forked process may go on reading, and what fails is one file rather than the storage.
        """
        ...

    def signed(self, key: str, seconds: int) -> str | None:
        """A URL from which anybody can GET a blob, with or without a range, until so many seconds are over, or the
        credentials that sign it; None where storage has no such URLs.

        Raises:
            StorageError: there are no credentials.
        """
        ...


class FileReader(BlobReader, Protocol):
    """Blobs that are files of this machine. `are_files` tells whether a `BlobReader` is one."""

    def path(self, key: str) -> Path:
        """Where the file of a blob is, or would be; for an empty key, the folder of all."""
        ...

    def descriptor(self, key: str) -> int:
        """A file, opened for reading; or an `OSError`. The caller closes it."""
        ...

    def read_and_head(self, key: str) -> tuple[Bytes, BlobInfo]:
        """All of a small blob, and what `head` says of it, of the same file though its name be given to another.

        Raises:
            BlobNotFoundError: there is no such blob.
            StorageError: it could not be read.
        """
        ...

    def check_version(self) -> None:
        """See that what was opened by `descriptor` until now belongs to the version that the blobs are pinned to.

        Raises:
            StoreReplacedError: it may not.
        """
        ...


def are_files(blobs: BlobReader) -> TypeGuard[FileReader]:
    """Whether blobs are files that can be opened and mapped: `BlobReader.is_local`, for type checkers, too."""
    return blobs.is_local


class Blobs(BlobReader, Protocol):
    """What can be written, too."""

    @property
    def is_emulated(self) -> bool:
        """Whether a condition had to be checked by looking first, since storage knows no conditional writes.

        Two processes can then both be told that they created a blob.
        """
        ...

    def create(self, key: str, parts: Sequence[Bytes], *, metadata: Mapping[str, str] | None = None) -> bool:
        """Write a new blob, whole or not at all; it is durable when this returns.

        Args:
            key: where.
            parts: written one after the other.
            metadata: kept with the blob where storage can. ASCII; names in lower case.

        Returns:
            False if another call created a blob of this key. It is never overwritten, nor touched. A call whose
            reply got lost finds its own blob and returns True.

        Raises:
            StorageError: no permission, no space, no credentials, no such bucket, not reachable.
        """
        ...

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:
        """Put new content in the place of the blob whose tag is ``expected``, atomically; durable when this returns.

        Readers find the old content or the new, whole.

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
        """Names of the files directly below ``prefix/``, each with its bytes, in one listing."""
        ...

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is fine."""
        ...

    def free_nbytes(self) -> int | None:
        """Free space, where the storage can say."""
        ...

    def probe_folders(self) -> None:
        """See that blobs can be written in all places where keys may lead, before there is work to lose.

        Raises:
            StorageError: in one they cannot.
        """
        ...


class Distant:
    """What blobs say of themselves that are no files of this machine, and that nobody signs URLs of. A base class."""

    is_local = False

    def signed(self, key: str, seconds: int) -> str | None:  # noqa: ARG002
        """As `BlobReader.signed`: there is none."""
        return None

    def probe_folders(self) -> None:
        """As `Blobs.probe_folders`: there is one place alone, which `probe` tries."""


def check_key(key: str) -> str:
    """The key itself, if it names something below the root: parts joined by ``/``, none of them empty, ``.`` or ``..``.

    Raises:
        StorageError: it does not, or has a backslash or NUL, which some file systems take for something else.
    """
    if any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or "\0" in key:
        raise StorageError(
            f"{key!r} is no key of a blob; expected names joined by '/' that stay below the root, as 'a/b'"
        )
    return key

"""The little that a store asks of storage: conditional writes, ranged reads, listings, deletion."""

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.errors import MissingExtraError, StorageError
from actstore.storage.errors import BlobNotFoundError
from actstore.storage.urls import LOCAL, S3, check_url, local_path, scheme_of
from actstore.store.format.shard import Bytes

__all__ = ["BlobInfo", "BlobNotFoundError", "Blobs", "check_key", "open_blobs", "probe"]

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


def is_served(url: str) -> bool:
    """Whether a URL is that of a store that ``actstore serve`` gives."""
    return url.startswith(("http://", "https://", "http+unix://")) and "/v1/stores" in url


def open_blobs(url: str) -> Blobs:
    """The storage below a path or URL: ``runs/a``, ``file:///runs/a``, ``s3://bucket/a``, any fsspec URL.

    S3 is served by obstore where it is installed, else by s3fs; the environment variable ``ACTSTORE_S3`` may name
    one of the two.

    Raises:
        StorageError: the URL has a scheme that no installed package serves, is that of a server, or one that clients
            take for different places (`check_url`); or ``ACTSTORE_S3`` has another value.
        MissingExtraError: ``ACTSTORE_S3`` is ``obstore``, and that is not installed.
    """
    if is_served(url):
        raise StorageError(
            f"{url} is a store of a server, which can only be read through actstore.open; give the URL of its storage"
        )
    scheme = scheme_of(url)
    if scheme in LOCAL:
        from actstore.storage.local import LocalBlobs

        return LocalBlobs(local_path(url, "the URL"))
    url = check_url(url)
    if scheme in S3:
        return _open_s3(url)
    from actstore.storage.fsspec_files import RemoteBlobs

    return RemoteBlobs(url)


def _open_s3(url: str) -> Blobs:
    chosen = os.environ.get("ACTSTORE_S3") or None
    if chosen not in (None, "s3fs", "obstore"):
        raise StorageError(f"ACTSTORE_S3 is {chosen!r}; expected 's3fs' or 'obstore', or leave it unset")
    is_there = importlib.util.find_spec("obstore") is not None
    if chosen == "obstore" and not is_there:
        raise MissingExtraError(
            "ACTSTORE_S3 is 'obstore', which is not installed; pip install 'actstore[s3-fast]', or unset it"
        )
    if chosen == "s3fs" or not is_there:
        from actstore.storage.s3_fsspec import S3fsBlobs

        return S3fsBlobs(url)
    from actstore.storage.s3_obstore import ObjectBlobs

    return ObjectBlobs(url)


_PROBES: Final = 3
"""A key that another process removed in between says nothing, so one probe that fails is not enough."""


def probe(blobs: Blobs) -> bool:
    """Prove, before any work, that blobs can be written and read here; nothing is left behind.

    Returns:
        Whether a second create of a key is refused by the storage itself. Where it is not, two workers could both
        believe that they committed a segment, so only one process may commit.

    Raises:
        StorageError: it cannot be written or read, or gives other bytes than were written.
    """
    from actstore.storage.local import LocalBlobs

    if isinstance(blobs, LocalBlobs):
        blobs.probe_linked_folders()
    for _ in range(_PROBES):
        try:
            if _is_refused(blobs):
                return not blobs.is_emulated
        except BlobNotFoundError:
            continue  # somebody who sealed the store has cleaned up
    return False


def _is_refused(blobs: Blobs) -> bool:
    key = f"_actstore/probe/{uuid.uuid4().hex}"
    is_first = blobs.create(key, [b"probe"])
    try:
        _check_content(blobs, key, b"probe")
        is_second = blobs.create(key, [b"again"])
        _check_content(blobs, key, b"again" if is_second else b"probe")
    finally:
        with contextlib.suppress(StorageError):
            # A role that may create but not delete is a good one to have; it leaves a few bytes here.
            blobs.delete(key)
    return is_first and not is_second


def _check_content(blobs: Blobs, key: str, written: bytes) -> None:
    found = bytes(blobs.read(key))
    if found != written:
        raise StorageError(
            f"{blobs.url}/{key} gives {found!r} where {written!r} was written; use storage that keeps what it is given"
        )

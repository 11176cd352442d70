"""The little that a store asks of storage: create-only writes, ranged reads, sizes, names, deletion."""

import contextlib
import uuid
from collections.abc import Sequence
from typing import Protocol

from actstore.errors import StorageError
from actstore.store.shard import Bytes


class BlobNotFoundError(StorageError, FileNotFoundError):
    """There is no blob of this key. Any other failure to read raises a plain `StorageError`."""


class Blobs(Protocol):
    """Named byte strings below one URL. Keys are relative, with ``/`` between their parts."""

    url: str

    def create(self, key: str, parts: Sequence[Bytes]) -> bool:
        """Write a new blob, whole or not at all; it is durable when this returns.

        Returns:
            False if a blob of this key was there before. It is never overwritten, nor touched.

        Raises:
            StorageError: no permission, no space, no credentials, no such bucket, not reachable.
        """
        ...

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """Bytes ``start:start + nbytes`` of a blob, or all of it.

        Raises:
            BlobNotFoundError: there is no such blob.
            StorageError: it is shorter than asked for, or could not be read.
        """
        ...

    def size(self, key: str) -> int | None:
        """Bytes of a blob; None if there is none."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Names directly below ``prefix/``, sorted; empty if there are none."""
        ...

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is fine."""
        ...

    def free_nbytes(self) -> int | None:
        """Free space, where the storage can say."""
        ...


def open_blobs(url: str) -> Blobs:
    """The storage below a path or URL: ``runs/a``, ``file:///runs/a``, ``s3://bucket/a``, any fsspec URL.

    Raises:
        StorageError: the URL has a scheme that no installed package serves.
    """
    if "://" not in url or url.startswith(("file://", "local://")):
        from actstore.store.local import LocalBlobs

        return LocalBlobs(url.removeprefix("file://").removeprefix("local://"))
    from actstore.store.remote import RemoteBlobs

    return RemoteBlobs(url)


def check_writable(blobs: Blobs) -> None:
    """Prove, before any work, that blobs can be created here and that a second create of a key is refused.

    Raises:
        StorageError: it cannot be written, or create-only writes are silently treated as overwrites, which would
            let two workers write the same segment.
    """
    key = f"_actstore/probe/{uuid.uuid4().hex}"
    first = blobs.create(key, [b"probe"])
    second = blobs.create(key, [b"again"])
    with contextlib.suppress(StorageError):
        # A role that may create but not delete is a good one to have; it leaves a few bytes here.
        blobs.delete(key)
    if not first or second:
        raise StorageError(
            f"{blobs.url} does not enforce create-only writes (S3: If-None-Match), which keep workers from "
            "overwriting each other; use a storage that does"
        )

"""Blobs that read only what belongs to the version of a store that was opened."""

import copy
from typing import Protocol, Self

from actstore.storage.blobs import BlobReader


class OpenedVersion(Protocol):
    """A store as it was when it was opened. Storage knows no more of it than this; `store` has the class."""

    def tag(self, key: str) -> str | None:
        """The tag of a blob that is known to belong to this version; None if it is not known yet."""
        ...

    def seen(self, key: str, tag: str | None) -> None:
        """Take note of a blob that was read, or is held open.

        Args:
            key: key of the blob.
            tag: tag of what was read; None where storage has none.

        Raises:
            StoreReplacedError: the blob may be of another version.
        """
        ...

    def check(self) -> None:
        """Check that all that was read, or opened, until now belongs to this version.

        Raises:
            StorageError: the records of the store cannot be read.
            StoreReplacedError: something may be of another version.
        """
        ...

    def explain(self, error: Exception) -> None:
        """Check whether an error in reading comes from a store that was replaced, and say so.

        Raises:
            StoreReplacedError: it does.
        """
        ...


class Pinnable:
    """A `BlobReader` that reports the tags of what it reads to a version, and so returns nothing of another store."""

    _version: OpenedVersion | None = None

    def pinned(self, version: OpenedVersion) -> Self:
        """The same blobs over the same connections. Reading raises a `StoreReplacedError` for what may not belong to
        this version.
        """
        view = copy.copy(self)
        view._version = version
        return view

    def check_version(self) -> None:
        """Check that all that was opened until now belongs to the version, if these blobs are pinned to one.

        Raises:
            StoreReplacedError: something may be of another version.
        """
        if self._version is not None:
            self._version.check()

    def _explain(self, error: Exception) -> None:
        """Check whether an error in reading comes from a store that was replaced, and say so.

        Raises:
            StoreReplacedError: it does.
        """
        if self._version is not None:
            self._version.explain(error)


def pinned(blobs: BlobReader, version: OpenedVersion) -> BlobReader:
    """Pin blobs to a version if they are `Pinnable`. Blobs of a server are not, since it checks the version itself."""
    return blobs.pinned(version) if isinstance(blobs, Pinnable) else blobs


def check_version(blobs: BlobReader) -> None:
    """Call `Pinnable.check_version` if blobs are `Pinnable`."""
    if isinstance(blobs, Pinnable):
        blobs.check_version()

"""Blobs that give nothing but what belongs to the version of a store that was opened."""

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
            key: of the blob.
            tag: of what was read; None where storage cannot tell.

        Raises:
            StoreReplacedError: it may be of another version.
        """
        ...

    def check(self) -> None:
        """See that all that was read, or opened, until now belongs to this version.

        Raises:
            StorageError: that cannot be read.
            StoreReplacedError: it may not.
        """
        ...

    def explain(self, error: Exception) -> None:
        """Say of what could not be read that the store was replaced, if that is why.

        Raises:
            StoreReplacedError: it was.
        """
        ...


class Pinnable:
    """A `BlobReader` that tells a version the tag of what it reads, so that nothing of another store gets out."""

    _version: OpenedVersion | None = None

    def pinned(self, version: OpenedVersion) -> Self:
        """The same blobs over the same connections. What they read belongs to this version, or is a
        `StoreReplacedError`.
        """
        view = copy.copy(self)
        view._version = version
        return view

    def check_version(self) -> None:
        """See that what was opened by name until now belongs to the version, where there is one.

        Raises:
            StoreReplacedError: it may not.
        """
        if self._version is not None:
            self._version.check()

    def _explain(self, error: Exception) -> None:
        """Say of what could not be read that the store was replaced, if that is why.

        Raises:
            StoreReplacedError: it was.
        """
        if self._version is not None:
            self._version.explain(error)


def pinned(blobs: BlobReader, version: OpenedVersion) -> BlobReader:
    """`Pinnable.pinned`, where blobs can be. A server sees to it by itself."""
    return blobs.pinned(version) if isinstance(blobs, Pinnable) else blobs


def check_version(blobs: BlobReader) -> None:
    """`Pinnable.check_version`, likewise."""
    if isinstance(blobs, Pinnable):
        blobs.check_version()

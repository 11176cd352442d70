"""Blobs that give nothing but what belongs to the version of a store that was opened."""

import copy
from typing import TYPE_CHECKING, Self

from actstore.storage.blobs import BlobReader

if TYPE_CHECKING:
    from actstore.store.reading.version import Version


class Pinnable:
    """A `BlobReader` that can tell a `Version` the tag of what it reads, so that nothing of another store gets out."""

    _version: "Version | None" = None

    def pinned(self, version: "Version") -> Self:
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


def pinned(blobs: BlobReader, version: "Version") -> BlobReader:
    """`Pinnable.pinned`, where blobs can be. A server sees to it by itself."""
    return blobs.pinned(version) if isinstance(blobs, Pinnable) else blobs


def check_version(blobs: BlobReader) -> None:
    """`Pinnable.check_version`, likewise."""
    if isinstance(blobs, Pinnable):
        blobs.check_version()

"""What a check of a store has read so far, and what it found."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError, StorageError, UncheckedError
from actstore.storage.blobs import BlobNotFoundError, Blobs, Bytes
from actstore.store.checking.verification import Finding
from actstore.store.format.document import Document
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import crc32c
from actstore.store.format.shard_reader import decode
from actstore.store.records.commit import ObjectRecord

D = TypeVar("D", bound=Document)
OnObject = Callable[[int], None]
"""Called with the size of each object that was checked."""


class Inspection:
    """One pass over a store. Whatever is wrong becomes a `Finding`; the pass goes on. Threads may share one."""

    def __init__(self, blobs: Blobs, on_object: OnObject = lambda _nbytes: None) -> None:
        self.blobs = blobs
        self.findings: list[Finding] = []
        self.n_objects = 0
        self.nbytes = 0
        self._on_object = on_object
        self._counting = threading.Lock()

    def found(self, key: str, problem: str, **fields: Any) -> None:
        """Note something that is not as it should be.

        Args:
            key: where.
            problem: what, as the rest of a sentence that begins with the key.
            fields: others of `Finding`.
        """
        self.findings.append(Finding(key, problem, **fields))

    def failed(self, key: str, error: ActstoreError, **fields: Any) -> None:
        """Note what an error says of a key."""
        if isinstance(error, BlobNotFoundError):
            self.found(key, "is missing", **fields)
            return
        text = str(error)
        for place in (f"{self.blobs.url}/{key}", key):
            text = text.removeprefix(place)
        self.found(key, text.lstrip(" :"), **fields)

    def read(self, key: str) -> Bytes:
        """An object as a whole; it is counted.

        Raises:
            BlobNotFoundError: there is none.
            StorageError: it is damaged.
            UncheckedError: nobody can tell, since storage does not let us read it.
        """
        try:
            data = self.blobs.read(key)
        except BlobNotFoundError:
            raise
        except StorageError as error:
            if self.blobs.is_local and not isinstance(error.__cause__, PermissionError):
                raise  # a bad sector, or a folder in the place of a file
            raise UncheckedError(
                f"{error}; nothing can be said of this store until it can be read"
            ) from error
        with self._counting:
            self.n_objects += 1
            self.nbytes += len(data)
            self._on_object(len(data))
        return data

    def document(self, kind: type[D], key: str, **fields: Any) -> D | None:
        """A document of the store; None if it cannot be read. It is damage, too, if it is not spelled as this format
        spells it.
        """
        try:
            data = bytes(self.read(key))
            document = kind.from_bytes(data, key)
        except StorageError as error:
            self.failed(key, error, **fields)
            return None
        if document.to_bytes() != data:
            self.found(key, "is not spelled as this format spells it", **fields)
        return document

    def same(self, key: str, expected: bytes, problem: str, **fields: Any) -> None:
        """Compare an object with what it must be, byte by byte; note ``problem`` if it is something else."""
        try:
            if bytes(self.read(key)) != expected:
                self.found(key, problem, **fields)
        except StorageError as error:
            self.failed(key, error, **fields)

    def shard(
        self, layout: ArrayLayout, index: int, record: ObjectRecord, **fields: Any
    ) -> NDArray[Any] | None:
        """The rows of a shard without padding, if it is what its record says; None otherwise.

        Args:
            layout: the array.
            index: number of the shard.
            record: what was committed.
            fields: of a `Finding`.
        """
        key = layout.key(index)
        try:
            data = np.frombuffer(self.read(key), dtype=np.uint8)
            if len(data) != record.nbytes:
                self.found(key, f"has {len(data)} bytes where {record.nbytes} were committed", **fields)
                return None
            checksum = crc32c(data)
            if checksum != record.crc32c:
                self.found(key, f"has crc32c {checksum} where {record.crc32c} was committed", **fields)
                return None
            return decode(layout, index, data)
        except StorageError as error:
            self.failed(key, error, **fields)
            return None

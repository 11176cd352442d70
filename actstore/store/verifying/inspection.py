"""The state of a check: what it has read, and its findings."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError, StorageError, UncheckedError
from actstore.storage.blobs import BlobNotFoundError, Blobs, Bytes
from actstore.store.format.document import Document
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import crc32c
from actstore.store.format.shard_reader import decode
from actstore.store.records.commit import ObjectRecord
from actstore.store.verifying.findings import Finding

D = TypeVar("D", bound=Document)
OnObject = Callable[[int], None]
"""Called with the size of each object that was checked."""


class Inspection:
    """One pass over a store. Every problem becomes a `Finding`, and the pass goes on. Threads may share an instance."""

    def __init__(self, blobs: Blobs, on_object: OnObject = lambda _nbytes: None) -> None:
        self.blobs = blobs
        self.findings: list[Finding] = []
        self.n_objects = 0
        self.nbytes = 0
        self._on_object = on_object
        self._counting = threading.Lock()

    def report(self, key: str, problem: str, **fields: Any) -> None:
        """Add a finding.

        Args:
            key: the key of the object.
            problem: the problem, as a sentence without its subject, which is the key.
            fields: further fields of the `Finding`.
        """
        self.findings.append(Finding(key, problem, **fields))

    def report_error(self, key: str, error: ActstoreError, **fields: Any) -> None:
        """Add a finding with the message of an error about a key."""
        if isinstance(error, BlobNotFoundError):
            self.report(key, "is missing", **fields)
            return
        text = str(error)
        for place in (f"{self.blobs.url}/{key}", key):
            text = text.removeprefix(place)
        self.report(key, text.lstrip(" :"), **fields)

    def read(self, key: str) -> Bytes:
        """Read and count a whole object.

        Raises:
            BlobNotFoundError: there is no such object.
            StorageError: the object is damaged.
            UncheckedError: storage does not let us read it, so nothing is known of it.
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
        """Read a document; None if it cannot be read. A document that is not in canonical form is damage, too."""
        try:
            data = bytes(self.read(key))
            document = kind.from_bytes(data, key)
        except StorageError as error:
            self.report_error(key, error, **fields)
            return None
        if document.to_bytes() != data:
            self.report(key, "is not in the canonical form of this format", **fields)
        return document

    def compare(self, key: str, expected: bytes, problem: str, **fields: Any) -> None:
        """Compare an object with its expected bytes; add ``problem`` as a finding if they differ."""
        try:
            if bytes(self.read(key)) != expected:
                self.report(key, problem, **fields)
        except StorageError as error:
            self.report_error(key, error, **fields)

    def shard(
        self, layout: ArrayLayout, index: int, record: ObjectRecord, **fields: Any
    ) -> NDArray[Any] | None:
        """The rows of a shard, without padding, if it agrees with its record; otherwise None.

        Args:
            layout: the layout of the array.
            index: the number of the shard.
            record: the record of the committed shard.
            fields: further fields of a `Finding`.
        """
        key = layout.key(index)
        try:
            data = np.frombuffer(self.read(key), dtype=np.uint8)
            if len(data) != record.nbytes:
                self.report(key, f"has {len(data)} bytes where {record.nbytes} were committed", **fields)
                return None
            checksum = crc32c(data)
            if checksum != record.crc32c:
                self.report(key, f"has crc32c {checksum} where {record.crc32c} was committed", **fields)
                return None
            return decode(layout, index, data)
        except StorageError as error:
            self.report_error(key, error, **fields)
            return None

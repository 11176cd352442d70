"""Blobs on storage where a second create of a key overwrites the first."""

import threading
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.storage.blobs import BlobInfo, Blobs, Bytes, Distant

_LOCKS: Final = tuple(threading.Lock() for _ in range(64))


class LookFirst(Distant):
    """Checks the condition of each write to other blobs before the write.

    It wraps storage for which `probe` returns False, so that no blob is overwritten that exists before a write begins.
    It keeps the threads of one process apart, also those that wrap the same storage again. It cannot keep two processes
    apart: both can find a key free, and the second then overwrites what the first wrote.
    """

    is_emulated = True

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    @property
    def url(self) -> str:
        return self._blobs.url

    @property
    def n_retries(self) -> int:
        return self._blobs.n_retries

    def create(self, key: str, parts: Sequence[Bytes], *, metadata: Mapping[str, str] | None = None) -> bool:
        with self._lock(key):
            return self._blobs.head(key) is None and self._blobs.create(key, parts, metadata=metadata)

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:
        with self._lock(key):
            existing = self._blobs.head(key)
            if existing is None or existing.tag != expected:
                return False
            return self._blobs.replace(key, parts, expected=expected)

    def _lock(self, key: str) -> threading.Lock:
        return _LOCKS[hash((self.url, key)) % len(_LOCKS)]

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        return self._blobs.read(key, start, nbytes)

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        self._blobs.read_into(key, start, out)

    def head(self, key: str) -> BlobInfo | None:
        return self._blobs.head(key)

    def names(self, prefix: str) -> list[str]:
        return self._blobs.names(prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        return self._blobs.sizes(prefix)

    def delete(self, key: str) -> None:
        self._blobs.delete(key)

    def free_nbytes(self) -> int | None:
        return self._blobs.free_nbytes()

    def probe_folders(self) -> None:
        self._blobs.probe_folders()

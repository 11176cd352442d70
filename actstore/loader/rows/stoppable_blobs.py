"""Blobs whose reads another thread can stop, and that count the bytes read."""

import threading

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.storage.blobs import BlobInfo, BlobReader, Bytes, Distant


class StoppableBlobs(Distant):
    """Blobs that can be stopped: requests under way are then finished, and all others are refused."""

    def __init__(self, blobs: BlobReader) -> None:
        self._blobs = blobs
        self.stop = threading.Event()
        """Set to stop the current read; replaced for each read."""
        self.nbytes_read = 0
        self._counting = threading.Lock()

    @property
    def url(self) -> str:
        return self._blobs.url

    @property
    def n_retries(self) -> int:
        return self._blobs.n_retries

    def _check(self, key: str) -> None:
        if self.stop.is_set():
            raise LoaderError(
                f"{self.url}/{key} was not read: the loader was closed, or moved to another batch; request "
                "the batch again"
            )

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self.nbytes_read += nbytes

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """Like `BlobReader.read`.

        Raises:
            LoaderError: the read was stopped.
        """
        self._check(key)
        data = self._blobs.read(key, start, nbytes)
        self._count(len(data))
        return data

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Like `BlobReader.read_into`.

        Raises:
            LoaderError: the read was stopped.
        """
        self._check(key)
        self._blobs.read_into(key, start, out)
        self._count(out.nbytes)

    def head(self, key: str) -> BlobInfo | None:
        return self._blobs.head(key)

"""Shards of a store elsewhere, kept on a local disk."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from actstore.store.blobs import BlobInfo, BlobReader
from actstore.store.durable import locked
from actstore.store.local import PARTIAL, LocalBlobs
from actstore.store.shard import Bytes
from actstore.store.storage_errors import BlobNotFoundError

T = TypeVar("T")

FOLDER: Final = "actstore-shards"
"""Below the folder that the user names."""
_LOCK: Final = "evicting"
_SLACK: Final = 0.05
"""Of the limit: what this process fetches before it looks again at what others did, and what it frees beyond need."""
_ATTEMPTS: Final = 3


class DiskCache:
    """Blobs that are fetched whole when something of them is read, and read from files then.

    Several processes may use one folder. A file appears there whole and on disk, or not at all; what was not read for
    longest is removed when there is more than the limit. A file that is being read, or mapped, stays readable then.
    """

    def __init__(
        self, blobs: BlobReader, folder: str | os.PathLike[str], store_id: str, limit: int | None
    ) -> None:
        """
        Args:
            blobs: where the shards come from.
            folder: of the cache, for any number of stores.
            store_id: what tells this store from all others, also from one that was at the same URL before.
            limit: bytes of all that is cached below the folder, give or take a twentieth for each process; None for no
                limit.
        """
        self._blobs = blobs
        # All below is ours to remove; the user's folder may hold anything else.
        self._root = Path(folder).expanduser().absolute() / FOLDER
        self.limit = limit
        """Bytes of all files below the folder; None for no limit."""
        name = hashlib.sha256(f"{blobs.url}\n{store_id}".encode()).hexdigest()[:32]
        self.files = LocalBlobs(self._root / name)
        """The cached blobs, by the same keys."""
        self._locks = tuple(threading.Lock() for _ in range(64))
        self._counting = threading.Lock()
        self._n_new = 0
        self.n_hits = self.n_misses = 0
        for left in self.files.names(PARTIAL):
            # Of a process that was killed. One that is at work writes its file again.
            self.files.delete(f"{PARTIAL}/{left}")

    @property
    def url(self) -> str:
        """Of the storage that is cached."""
        return self._blobs.url

    @property
    def n_retries(self) -> int:
        """Of the storage that is cached."""
        return self._blobs.n_retries

    def fetch(self, key: str) -> None:
        """See that a blob is here.

        Raises:
            BlobNotFoundError: there is no such blob.
            StorageError: it cannot be read, or there is no space for it.
        """
        path = self.files.path(key)
        with self._locks[hash(key) % len(self._locks)]:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                self.n_hits += 1
                return
            info = self._blobs.head(key)
            if info is None:
                raise BlobNotFoundError(f"{self._blobs.url}/{key} does not exist")
            data = np.empty(info.nbytes, np.uint8)
            self._blobs.read_into(key, 0, data)
            self.files.create(key, [data])
            self.n_misses += 1
        with self._counting:
            self._n_new += info.nbytes
            is_time = self.limit is not None and self._n_new > _SLACK * self.limit
            if is_time:
                self._n_new = 0
        if is_time:
            self.make_room()

    def make_room(self) -> None:
        """Remove what was not used for longest, until there is less than the limit."""
        if self.limit is None:
            return
        self._root.mkdir(parents=True, exist_ok=True)
        with locked(self._root / _LOCK):
            found = sorted(_files(self._root))
            total = sum(nbytes for _, nbytes, _ in found)
            goal = self.limit if total <= self.limit else (1 - _SLACK) * self.limit
            for _, nbytes, path in found:
                if total <= goal:
                    return
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                total -= nbytes

    def _from_file(self, key: str, read: Callable[[BlobReader], T]) -> T:
        for _ in range(_ATTEMPTS):
            self.fetch(key)
            try:
                return read(self.files)
            except BlobNotFoundError:
                continue  # removed since, by a process that needed the room
        return read(self._blobs)

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """As `Blobs.read`."""
        return self._from_file(key, lambda blobs: blobs.read(key, start, nbytes))

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """As `Blobs.read_into`."""
        self._from_file(key, lambda blobs: blobs.read_into(key, start, out))

    def head(self, key: str) -> BlobInfo | None:
        """Of the storage that is cached."""
        return self._blobs.head(key)


def _files(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(time of last use, bytes, path) of all cached files."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != Path(PARTIAL).parts[0]]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = (Path(here) / name).stat()
                if name != _LOCK:
                    yield status.st_mtime_ns, status.st_size, Path(here) / name

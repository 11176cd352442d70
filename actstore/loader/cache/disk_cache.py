"""Shards of a remote store, kept on a local disk."""

import contextlib
import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError, StorageError
from actstore.storage.blobs import BlobInfo, BlobReader, Bytes, Distant
from actstore.storage.durable import locked
from actstore.storage.errors import BlobNotFoundError, DiskFullError
from actstore.storage.local import LocalBlobs
from actstore.storage.partial_files import PARTIAL
from actstore.storage.pinned import check_version
from actstore.storage.urls import local_path
from actstore.store.reading.checksums import Checksums, pieces_of

T = TypeVar("T")

FOLDER: Final = "actstore-shards"
"""Name of the cache's folder in the folder that the user names."""
_LOCK: Final = "evicting"
_FETCHING: Final = "fetching-"
"""Prefix of the lock files that exist while a blob is fetched."""
_SLACK: Final = 0.05
"""Share of the limit that this process fetches before it looks again at what others did, and that it frees beyond need.
"""
ATTEMPTS: Final = 3
"""How often to fetch a file that other processes remove before it can be used."""
_ABANDONED_S: Final = 600.0
"""Seconds without a write after which an unfinished file is taken to be of a process that is gone."""
_LOG: Final = logging.getLogger(__name__)


class NoRoomError(LoaderError):
    """More bytes are needed at once than the cache may hold."""


class Mapped(Protocol):
    """Files of the cache that are mapped."""

    @property
    def nbytes(self) -> int:
        """Bytes of the files, or 0 once they are unmapped."""


class DiskCache(Distant):
    """Blobs that are fetched whole when any part of them is read, and are then read from files.

    Several processes may use one folder. A file appears there complete and flushed to disk, or not at all. Beyond the
    limit, the least recently used files are removed; a file that is being read or is mapped stays readable. Each fetch
    takes `PIECE_NBYTES` of memory. Only what was committed gets into the cache.
    """

    def __init__(
        self,
        blobs: BlobReader,
        folder: str | os.PathLike[str],
        store_id: str,
        limit: int | None,
        checksums: Checksums | None = None,
    ) -> None:
        """
        Args:
            blobs: the storage that the shards come from.
            folder: the folder of the cache, for any number of stores.
            store_id: an id that tells this store from all others, also from an earlier one at the same URL.
            limit: the most bytes of all cached files below the folder, give or take a twentieth per process; None for
                no limit.
            checksums: the checksums of what was committed; None if they are not known.
        """
        self.blobs = blobs
        """The storage that is cached."""
        # Everything below is the cache's to remove; the user's folder may hold anything else.
        self._root = local_path(folder, "cache_dir") / FOLDER
        self.limit = limit
        """The most bytes of all files below the folder; None for no limit."""
        self._checksums = checksums
        # Differs from the names in earlier releases, which did not check what they fetched.
        name = hashlib.sha256(f"{blobs.url}\n{store_id}\nchecked".encode()).hexdigest()[:32]
        self.files = LocalBlobs(self._root / name)
        """The cached blobs, under the same keys."""
        self._locks = tuple(threading.Lock() for _ in range(64))
        self._counting = threading.Lock()
        self._n_new = self._n_fetching = 0
        self._mapped = weakref.WeakSet[Mapped]()
        self._has_warned = False
        self._left_out: set[str] = set()
        """Keys of blobs that did not fit or did not stay. They are read from storage, or each read would fetch them
        whole again.
        """
        self.n_hits = self.n_misses = 0
        self._clean()

    def _clean(self) -> None:
        """Remove what killed processes left behind."""
        for name in self.files.names(PARTIAL):
            key = f"{PARTIAL}/{name}"
            with contextlib.suppress(OSError):  # removed meanwhile, or another user's
                if time.time() - self.files.path(key).stat().st_mtime > _ABANDONED_S:
                    self.files.delete(key)

    @property
    def url(self) -> str:
        """URL of the storage that is cached."""
        return self.blobs.url

    @property
    def n_retries(self) -> int:
        """Number of repeated requests to the storage that is cached."""
        return self.blobs.n_retries

    def fetch(self, key: str) -> None:
        """Make sure that a blob is in the cache.

        Raises:
            BlobNotFoundError: there is no such blob.
            DiskFullError: the disk has no space for it.
            NoRoomError: it is larger than the limit of the cache.
            StorageError: it cannot be read.
        """
        with self._locks[hash(key) % len(self._locks)]:
            if self._is_cached(key):
                self.n_hits += 1
                return
            with self._fetch_lock(key):
                if self._is_cached(key):  # another process has fetched it meanwhile
                    self.n_hits += 1
                    return
                whole = _Whole(self.blobs, key, self.limit, self._checksums)
                self.files.create(key, whole)
                self.n_misses += 1
        with self._counting:
            self._n_new += whole.nbytes
            is_time = self.limit is not None and self._n_new > _SLACK * self.limit
            if is_time:
                self._n_new = 0
        if is_time:
            self.make_room()

    @contextlib.contextmanager
    def _fetch_lock(self, key: str) -> Iterator[None]:
        """Lets one process at a time fetch a blob; the others find it then. If the lock cannot be had, it is fetched
        twice.
        """
        name = hashlib.sha256(f"{self.files.url}/{key}".encode()).hexdigest()[:32]
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # the lock is another user's, or the disk is full
                self._root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self._root / f"{_FETCHING}{name}"))
            yield

    def _is_cached(self, key: str) -> bool:
        """Whether a blob is in the cache. If it is, it counts as used now."""
        try:
            os.utime(self.files.path(key))
        except FileNotFoundError:
            return False
        except OSError:
            pass  # another user's file: it is there, and keeps its time
        return True

    @contextlib.contextmanager
    def room_for(self, nbytes: int) -> Iterator[None]:
        """Reserve room to fetch and map so many bytes; call `count` on what was mapped.

        All that is mapped stays within the limit together: it takes space on the disk until it is unmapped, even if the
        files are removed.

        Raises:
            NoRoomError: the limit would be exceeded.
        """
        with self._counting:
            if self.limit is not None and self._n_in_use + nbytes > self.limit:
                raise NoRoomError(
                    f"{nbytes} bytes are needed in cache_dir beside {self._n_in_use} in use, and cache_limit is "
                    f"{self.limit}"
                )
            self._n_fetching += nbytes
        try:
            yield
        finally:
            with self._counting:
                self._n_fetching -= nbytes

    def count(self, mapped: "Mapped") -> None:
        """Count files as in use for as long as they are mapped."""
        self._mapped.add(mapped)

    @property
    def _n_in_use(self) -> int:
        """Bytes of files that are mapped, or are about to be."""
        return self._n_fetching + sum(mapped.nbytes for mapped in self._mapped)

    def make_room(self) -> None:
        """Remove the least recently used files until the limit holds."""
        if self.limit is None:
            return
        with self._eviction_lock():
            cached_files = sorted(_files(self._root))
            total = sum(nbytes for _, nbytes, _ in cached_files)
            # Removing what is in use frees no space on the disk, and it would have to be fetched again.
            goal = self.limit if total <= self.limit else max((1 - _SLACK) * self.limit, self._n_in_use)
            for _, nbytes, path in cached_files:
                if total <= goal:
                    return
                with contextlib.suppress(PermissionError):  # another user's
                    path.unlink(missing_ok=True)
                    total -= nbytes

    @contextlib.contextmanager
    def _eviction_lock(self) -> Iterator[None]:
        """Lets one process at a time remove files. If the lock is another user's, removing is left to that user."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(PermissionError):
                self._root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self._root / _LOCK))
            yield

    def _from_file(self, key: str, read: Callable[[BlobReader], T]) -> T:
        for _ in range(0 if key in self._left_out else ATTEMPTS):
            try:
                self.fetch(key)
                return read(self.files)
            except (DiskFullError, NoRoomError) as error:
                self.warn_once(error)
                break
            except BlobNotFoundError:
                continue  # removed since by a process that needed the room
        self._left_out.add(key)
        return read(self.blobs)

    def warn_once(self, error: Exception) -> None:
        """Warn once that rows are not kept, which slows the next epoch and changes nothing else."""
        if not self._has_warned:
            self._has_warned = True
            _LOG.warning(
                "%s; the loader continues, and reads what is not in cache_dir again in each epoch", error
            )

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        """Like `Blobs.read`."""
        return self._from_file(key, lambda blobs: blobs.read(key, start, nbytes))

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Like `Blobs.read_into`."""
        self._from_file(key, lambda blobs: blobs.read_into(key, start, out))

    def head(self, key: str) -> BlobInfo | None:
        """Like `Blobs.head`, of the storage that is cached."""
        return self.blobs.head(key)


class _Whole:
    """All bytes of a blob, piece by piece. Each iteration reads them again."""

    def __init__(self, blobs: BlobReader, key: str, limit: int | None, checksums: Checksums | None) -> None:
        self._blobs = blobs
        self._key = key
        self._limit = limit
        self._checksums = checksums
        self.nbytes = 0

    def __iter__(self) -> Iterator[Bytes]:
        where = f"{self._blobs.url}/{self._key}"
        info = self._blobs.head(self._key)
        if info is None:
            check_version(self._blobs)
            raise BlobNotFoundError(f"{where} does not exist")
        if self._limit is not None and info.nbytes > self._limit:
            raise NoRoomError(f"{where} has {info.nbytes} bytes, and cache_limit is {self._limit}")
        self.nbytes = info.nbytes
        # An error after the last piece reaches whoever writes the file, which is then not given its name.
        if self._checksums is not None:
            yield from self._checksums.checked_pieces(self._blobs, self._key, info.nbytes)
            return
        yield from pieces_of(self._blobs, self._key, info.nbytes)
        now = self._blobs.head(self._key)
        if now is None or now.tag != info.tag:
            raise StorageError(f"{where} was replaced while it was read; open the store again")


def _files(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(time of last use in ns, bytes, path) of every cached file."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != Path(PARTIAL).parts[0]]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = (Path(here) / name).stat()
                if name != _LOCK and not name.startswith(_FETCHING):
                    yield status.st_mtime_ns, status.st_size, Path(here) / name

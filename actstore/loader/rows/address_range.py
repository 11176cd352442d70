"""Shards of an array side by side in one range of addresses, so that all of them are one tensor."""

import ctypes
import math
import mmap
import os
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.loader.ordering.order import Window
from actstore.loader.rows import mapping
from actstore.loader.rows.file_ends import FileEnds
from actstore.loader.rows.row_source import select, select_converted
from actstore.loader.rows.shard_places import ShardPlaces
from actstore.storage.errors import BlobNotFoundError, damaged
from actstore.storage.local import LocalBlobs
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import crc32c, index
from actstore.store.reading.checksums import Checksums

_SPARE_MAPS: Final = 4096
"""Of those that the system allows a process: other libraries need some, too."""
_LIMIT: Final = Path("/proc/sys/vm/max_map_count")


class AddressRange:
    """A `RowSource` of files that are mapped: all shards, or some.

    Nothing is read before it is asked for, and the memory is that of the page cache. Files may be deleted or replaced
    by others meanwhile: what is mapped stays.
    """

    def __init__(
        self,
        blobs: LocalBlobs,
        places: ShardPlaces,
        shards: NDArray[np.int64] | None = None,
        *,
        remedy: str = "",
        checksums: Checksums | None = None,
    ) -> None:
        """
        Args:
            blobs: where the files are.
            places: of an array that `can_map`, all of it committed.
            shards: numbers of those that are wanted, ascending; None for all.
            remedy: what to do about a file that has become shorter, if not to verify the store.
            checksums: that files are compared with when rows of them are first gathered; None compares nothing.

        Raises:
            BlobNotFoundError: a file is missing.
            StorageError: a file has another size than it must, or cannot be mapped.
            StoreReplacedError: the files may be of another store than was opened.
        """
        self._blobs = blobs
        self._places = places
        self._remedy = remedy or f"the store is damaged: run `actstore verify {blobs.url}`"
        shards = np.arange(places.n_shards) if shards is None else shards
        # Shards begin where both a page and a row would.
        step = math.lcm(mmap.PAGESIZE, places.row_nbytes)
        strides = [-(-layout.shard_rows * layout.row_nbytes // step) * step for layout in places.layouts]
        self._offsets = np.full(places.n_shards, -1, np.int64)
        """Of each shard from the first address; -1 for those that are not here."""
        self._shifts = np.zeros(places.n_shards, np.int64)
        """By shard: what is added to the number of a row to find it here."""
        self._inodes = np.zeros(places.n_shards, np.uint64)
        ends = np.cumsum(np.array(strides, np.int64)[places.sections[shards]])
        nbytes = int(ends[-1])
        self._offsets[shards] = [0, *ends[:-1]]
        self._shifts[shards] = self._offsets[shards] // places.row_nbytes - places.first_rows[shards]
        self._files_nbytes = int(places.nbytes[shards].sum())
        base, self._faults = mapping.reserve(nbytes), list[int]()
        self._base = base
        faults, end = self._faults, base + nbytes

        def on_fault(address: int) -> tuple[int, int] | None:
            if not base <= address < end:
                return None
            faults.append(address)
            return base, nbytes

        mapping.listen(on_fault)
        self._finalizer = weakref.finalize(self, _release, on_fault, base, nbytes)
        # Not at the end of the process, when a thread may still be reading, and all memory goes anyway.
        self._finalizer.atexit = False
        self._checksums = checksums
        self._is_lent = False
        try:
            for shard in shards.tolist():
                self._map(shard)
        except StorageError:
            blobs.check_version()
            raise
        # What is mapped stays, whatever gets its name: it is enough to look once, behind the last of them.
        blobs.check_version()
        memory = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(base))
        self._memory: NDArray[np.uint8] = memory
        self._rows = torch.from_numpy(memory).view(-1, places.row_nbytes)
        self._ends = FileEnds(memory, places.n_shards)

    @staticmethod
    def can_map(layouts: Sequence[ArrayLayout]) -> bool:
        """Whether files of an array can be mapped side by side: on this system, with pages of this size."""
        return mapping.is_supported() and all(
            layout.compression is None
            and (layout.n_shards == 1 or layout.shard_rows * layout.row_nbytes % mmap.PAGESIZE == 0)
            for layout in layouts
        )

    @staticmethod
    def fits(layouts: Sequence[ArrayLayout]) -> bool:
        """Whether all files of an array can be mapped: as `can_map` says, and no more than the system allows."""
        return AddressRange.can_map(layouts) and sum(layout.n_shards for layout in layouts) <= n_free_maps()

    def _map(self, shard: int) -> None:
        path, expected = self._path(shard), int(self._places.nbytes[shard])
        try:
            file = self._blobs.descriptor(self._places.key(shard))
        except FileNotFoundError as error:
            raise BlobNotFoundError(f"{path} cannot be opened: {error.strerror}") from error
        except OSError as error:
            raise StorageError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            status = os.fstat(file)
            if status.st_size != expected or not stat.S_ISREG(status.st_mode):
                raise damaged(path, status.st_size, 0, expected)
            self._inodes[shard] = status.st_ino
            nbytes = int(self._places.data_nbytes[shard])
            mapping.map_file(self._base + int(self._offsets[shard]), nbytes, file)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{path} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(file)

    def _path(self, shard: int) -> str:
        return f"{self._blobs.url}/{self._places.key(shard)}"

    @property
    def nbytes(self) -> int:
        """Of the files, until they are given back."""
        return self._files_nbytes if self._finalizer.alive else 0

    def has(self, shards: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these are here."""
        return self._offsets[shards] >= 0

    def gather(self, rows: NDArray[np.int64], out: torch.Tensor, stored: torch.dtype | None = None) -> None:
        """Copy rows to where they are wanted.

        Args:
            rows: their numbers, sequence times context length plus position; of shards that are here.
            out: uint8 [len(rows), nbytes of a row], contiguous; or of another type, [len(rows), n].
            stored: type of the rows, if they are to be converted to that of ``out``.

        Raises:
            StorageError: a file has become shorter since it was mapped, or is not what was committed.
        """
        mapping.still_listens()
        shards = self._places(rows)
        at = rows + self._shifts[shards]
        if stored is None:
            select(self._rows, at, out)
        else:
            select_converted(self._rows, at, stored, out)
        self._check(shards)

    def check(self, rows: NDArray[np.int64]) -> None:
        """What `gather` does about files, for a caller who has read rows where they lie.

        Raises:
            StorageError: a file has become shorter since it was mapped, or is not what was committed.
        """
        mapping.still_listens()
        self._check(self._places(rows))

    def _check(self, shards: NDArray[np.int64]) -> None:
        cut = self._ends.check(shards, self._extent, self._check_first)
        if self._faults:
            is_before = self._offsets <= self._faults[0] - self._base
            cut = int(np.argmax(np.where(is_before, self._offsets, -1)))
        if cut is not None:
            raise self._shorter(cut)

    def touch(self, rows: NDArray[np.int64]) -> None:
        """Read a byte of each page of rows, so that the system fetches it. Other threads of Python run meanwhile."""
        memory = self._rows.view(-1)
        starts = (rows + self._shifts[self._places(rows)]) * self.row_nbytes
        within = np.arange(0, self.row_nbytes, mmap.PAGESIZE)
        mapping.still_listens()
        torch.take(memory, torch.from_numpy((starts[:, None] + within).reshape(-1)))

    def lend(self) -> None:
        """Stay mapped until nobody holds this object any more, even if it is closed before."""
        self._is_lent = True

    @property
    def row_nbytes(self) -> int:
        """Of each row."""
        return self._places.row_nbytes

    def addresses(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Where rows begin."""
        found: NDArray[np.int64] = self._base + (rows + self._shifts[self._places(rows)]) * self.row_nbytes
        return found.astype(np.uint64)

    def _extent(self, shard: int) -> tuple[int, int]:
        start = int(self._offsets[shard])
        return start, start + int(self._places.data_nbytes[shard])

    def _check_first(self, shard: int) -> None:
        """Of a file of which rows were gathered for the first time."""
        self._check_size(shard)
        key = self._places.key(shard)
        if self._checksums is None or self._checksums.was_checked(key):
            return
        start, end = self._extent(shard)
        tail = index(*self._places.at(shard))
        checksum = crc32c(tail, crc32c(self._memory[start:end]))
        if not self._faults:
            self._checksums.check(key, end - start + len(tail), checksum)
            self._checksums.set_checked(key)

    def _check_size(self, shard: int) -> None:
        try:
            status = os.stat(self._path(shard))  # noqa: PTH116 - a path takes four times as long to make
        except OSError:
            return  # what has no name here any more cannot be cut by it
        if status.st_ino == self._inodes[shard] and status.st_size < self._places.nbytes[shard]:
            raise self._shorter(shard)

    def _shorter(self, shard: int) -> StorageError:
        """What to say of a file that was cut.

        Raises:
            StoreReplacedError: another store was written over this one.
        """
        self._blobs.check_version()
        return StorageError(f"{self._path(shard)} has become shorter while it was read; {self._remedy}")

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """As `RowSource.need`; all of them are here."""

    def close(self) -> None:
        """Give the addresses back. Nothing may be gathered afterwards, or meanwhile, but by those to whom rows
        were lent: then this is done when nobody holds this object any more.
        """
        if not self._is_lent:
            self._finalizer()


def _release(on_fault: Any, base: int, nbytes: int) -> None:
    mapping.release(base, nbytes)
    mapping.forget(on_fault)


def n_free_maps() -> int:
    """Files that this process may still map."""
    with Path("/proc/self/maps").open("rb") as maps:
        return int(_LIMIT.read_text()) - sum(1 for _ in maps) - _SPARE_MAPS

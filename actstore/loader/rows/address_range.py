"""The shards of an array mapped side by side into one range of addresses, so that all of them are one tensor."""

import ctypes
import math
import mmap
import os
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.loader.ordering.order import Window
from actstore.loader.rows import mapping
from actstore.loader.rows.file_ends import FileEnds
from actstore.loader.rows.row_source import select, select_converted
from actstore.loader.rows.shard_places import ShardPlaces
from actstore.storage.blobs import FileReader
from actstore.storage.errors import BlobNotFoundError, damaged
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import crc32c, index
from actstore.store.reading.checksums import Checksums

if TYPE_CHECKING:
    import torch


_SPARE_MAPS: Final = 4096
"""Maps that are left to other libraries, out of those that the system allows a process."""
_LIMIT: Final = Path("/proc/sys/vm/max_map_count")


class AddressRange:
    """A `RowSource` over mapped files: all shards, or some.

    The system reads a page when it is first used, into the page cache. Files may be deleted or replaced meanwhile: what
    is mapped stays.
    """

    def __init__(
        self,
        blobs: FileReader,
        places: ShardPlaces,
        shards: NDArray[np.int64] | None = None,
        *,
        remedy: str = "",
        checksums: Checksums | None = None,
    ) -> None:
        """
        Args:
            blobs: the storage of the files.
            places: the shards of an array that `can_map` allows; all of it is committed.
            shards: the numbers of the shards to map, ascending; None for all.
            remedy: what an error advises about a file that has become shorter; by default, to verify the store.
            checksums: what files are compared with when their rows are first gathered; None compares nothing.

        Raises:
            BlobNotFoundError: a file is missing.
            StorageError: a file has the wrong size, or cannot be mapped.
            StoreReplacedError: the files may belong to another store than was opened.
        """
        self._blobs = blobs
        self._places = places
        self._remedy = remedy or f"the store is damaged: run `actstore verify {blobs.url}`"
        shards = np.arange(places.n_shards) if shards is None else shards
        # Each shard begins at a multiple of both the page size and the row size.
        step = math.lcm(mmap.PAGESIZE, places.row_nbytes)
        strides = [-(-layout.shard_rows * layout.row_nbytes // step) * step for layout in places.layouts]
        self._offsets = np.full(places.n_shards, -1, np.int64)
        """Distance of each shard from the first address, in bytes; -1 for shards that are not mapped."""
        self._shifts = np.zeros(places.n_shards, np.int64)
        """For each shard, what is added to the number of a row in the store to get its number in this range."""
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
        # Not at exit, when a thread may still be reading; the process's memory is freed anyway.
        self._finalizer.atexit = False
        self._checksums = checksums
        self._is_lent = False
        try:
            for shard in shards.tolist():
                self._map(shard)
        except StorageError:
            blobs.check_version()
            raise
        # What is mapped stays, whatever replaces the files, so one check after the last of them is enough.
        blobs.check_version()
        memory = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(base))
        self._memory: NDArray[np.uint8] = memory
        import torch

        self._rows = torch.from_numpy(memory).view(-1, places.row_nbytes)
        self._ends = FileEnds(memory, places.n_shards)

    @staticmethod
    def can_map(layouts: Sequence[ArrayLayout]) -> bool:
        """Whether this system, with its page size, can map the files of an array side by side."""
        return mapping.is_supported() and all(
            layout.compression is None
            and (layout.n_shards == 1 or layout.shard_rows * layout.row_nbytes % mmap.PAGESIZE == 0)
            for layout in layouts
        )

    @staticmethod
    def fits(layouts: Sequence[ArrayLayout]) -> bool:
        """Whether all files of an array can be mapped: as `can_map` says, and within the system's limit of maps."""
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
        """Bytes of the mapped files; 0 once they are unmapped."""
        return self._files_nbytes if self._finalizer.alive else 0

    def has(self, shards: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of these shards is mapped."""
        return self._offsets[shards] >= 0

    def gather(
        self, rows: NDArray[np.int64], out: "torch.Tensor", stored: "torch.dtype | None" = None
    ) -> None:
        """Copy rows into a tensor.

        Args:
            rows: their numbers, sequence times context length plus position; their shards must be mapped.
            out: uint8 [len(rows), bytes of a row], contiguous; with ``stored``, any type [len(rows), n].
            stored: the type of the stored rows, if they are converted to that of ``out``.

        Raises:
            StorageError: a file has become shorter since it was mapped, or is not what was committed.
        """
        mapping.ensure_handler()
        shards = self._places(rows)
        at = rows + self._shifts[shards]
        if stored is None:
            select(self._rows, at, out)
        else:
            select_converted(self._rows, at, stored, out)
        self._check(shards)

    def check(self, rows: NDArray[np.int64]) -> None:
        """Check files as `gather` does, for a caller that has read rows in place.

        Raises:
            StorageError: a file has become shorter since it was mapped, or is not what was committed.
        """
        mapping.ensure_handler()
        self._check(self._places(rows))

    def _check(self, shards: NDArray[np.int64]) -> None:
        cut = self._ends.check(shards, self._extent, self._check_first)
        if self._faults:
            is_before = self._offsets <= self._faults[0] - self._base
            cut = int(np.argmax(np.where(is_before, self._offsets, -1)))
        if cut is not None:
            raise self._shorter(cut)

    def touch(self, rows: NDArray[np.int64]) -> None:
        """Read a byte of each page of rows, so that the system fetches them. Other Python threads run meanwhile."""
        import torch

        memory = self._rows.view(-1)
        starts = (rows + self._shifts[self._places(rows)]) * self.row_nbytes
        within = np.arange(0, self.row_nbytes, mmap.PAGESIZE)
        mapping.ensure_handler()
        torch.take(memory, torch.from_numpy((starts[:, None] + within).reshape(-1)))

    def lend(self) -> None:
        """Keep the files mapped until nobody holds this object any more, even if it is closed before."""
        self._is_lent = True

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self._places.row_nbytes

    def addresses(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The address of each row, [len(rows)]."""
        addresses: NDArray[np.int64] = (
            self._base + (rows + self._shifts[self._places(rows)]) * self.row_nbytes
        )
        return addresses.astype(np.uint64)

    def _extent(self, shard: int) -> tuple[int, int]:
        start = int(self._offsets[shard])
        return start, start + int(self._places.data_nbytes[shard])

    def _check_first(self, shard: int) -> None:
        """Check a file when its rows are gathered for the first time."""
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
            return  # a file without a name here cannot have been cut under it
        if status.st_ino == self._inodes[shard] and status.st_size < self._places.nbytes[shard]:
            raise self._shorter(shard)

    def _shorter(self, shard: int) -> StorageError:
        """The error for a file that was cut.

        Raises:
            StoreReplacedError: another store was written over this one.
        """
        self._blobs.check_version()
        return StorageError(f"{self._path(shard)} has become shorter while it was read; {self._remedy}")

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """Do nothing: all windows are mapped already."""

    def close(self) -> None:
        """Unmap the files. Nothing may be gathered afterwards or meanwhile, except rows that were lent: with those, the
        files are unmapped when nobody holds this object any more.
        """
        if not self._is_lent:
            self._finalizer()


def _release(on_fault: Any, base: int, nbytes: int) -> None:
    mapping.release(base, nbytes)
    mapping.forget(on_fault)


def n_free_maps() -> int:
    """How many files this process may still map."""
    with Path("/proc/self/maps").open("rb") as maps:
        return int(_LIMIT.read_text()) - sum(1 for _ in maps) - _SPARE_MAPS

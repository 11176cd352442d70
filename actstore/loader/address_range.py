"""All shards of an array side by side in one range of addresses, so that the whole store is one tensor."""

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.loader import mapping
from actstore.loader.order import Window
from actstore.loader.row_source import select
from actstore.store.layout import ArrayLayout
from actstore.store.local import LocalBlobs
from actstore.store.storage_errors import damaged

_SPARE_MAPS: Final = 4096
"""Of those that the system allows a process: other libraries need some, too."""
_LIMIT: Final = Path("/proc/sys/vm/max_map_count")


class AddressRange:
    """A `RowSource` of files that are mapped.

    Nothing is read before it is asked for, and the memory is that of the page cache.
    """

    def __init__(self, blobs: LocalBlobs, layouts: Sequence[ArrayLayout]) -> None:
        """
        Args:
            blobs: where the files are.
            layouts: one after the other the sections of the array, all committed.

        Raises:
            StorageError: a file is missing or has another size than it must.
        """
        self._url = blobs.url
        length = layouts[0].shape[1]
        self._row_nbytes = layouts[0].row_nbytes // length
        # Sections begin where both a page and a row would.
        step = math.lcm(mmap.PAGESIZE, self._row_nbytes)
        starts = [0]
        for layout in layouts:
            last = layout.n_shards - 1
            nbytes = last * layout.shard_rows * layout.row_nbytes + layout.data_nbytes(last)
            starts.append(starts[-1] + -(-nbytes // step) * step)
        self._nbytes = starts[-1]
        self._base = mapping.reserve(self._nbytes)
        self._faults: list[int] = []
        base, end, faults = self._base, self._base + self._nbytes, self._faults

        def on_fault(address: int) -> bool:
            is_ours = base <= address < end
            if is_ours:
                faults.append(address)
            return is_ours

        mapping.listen(on_fault)
        self._finalizer = weakref.finalize(self, _release, on_fault, base, self._nbytes)
        # Not at the end of the process, when a thread may still be reading, and all memory goes anyway.
        self._finalizer.atexit = False
        self._files: list[tuple[int, str]] = []
        for layout, start in zip(layouts, starts[:-1], strict=True):
            self._map(blobs, layout, base + start)
        n_rows = np.array([layout.shape[0] * length for layout in layouts], np.int64)
        self._ends: NDArray[np.int64] = np.cumsum(n_rows)
        """Rows up to the end of each section."""
        gaps = np.array(starts[:-1], np.int64) // self._row_nbytes - (self._ends - n_rows)
        self._gaps = gaps if len(layouts) > 1 else None
        """Rows of nothing before each section."""
        self._memory = _tensor_at(base, self._nbytes // self._row_nbytes, self._row_nbytes)

    @staticmethod
    def fits(layouts: Sequence[ArrayLayout]) -> bool:
        """Whether the files can be mapped side by side: here, with pages of this size, and so many of them."""
        if not mapping.is_supported():
            return False
        n_files = sum(layout.n_shards for layout in layouts)
        if n_files + _n_maps() + _SPARE_MAPS > int(_LIMIT.read_text()):
            return False
        return all(
            layout.compression is None
            and (layout.n_shards == 1 or layout.shard_rows * layout.row_nbytes % mmap.PAGESIZE == 0)
            for layout in layouts
        )

    def _map(self, blobs: LocalBlobs, layout: ArrayLayout, address: int) -> None:
        for shard in range(layout.n_shards):
            key = layout.key(shard)
            path = blobs.path(key)
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StorageError(f"{path} cannot be opened: {error.strerror}") from error
            try:
                nbytes, expected = os.fstat(file).st_size, layout.shard_nbytes(shard)
                if nbytes != expected:
                    raise damaged(str(path), nbytes, 0, expected)
                mapping.map_file(address, layout.data_nbytes(shard), file)
            except StorageError:
                raise
            except OSError as error:
                raise StorageError(f"{path} cannot be mapped: {error.strerror}") from error
            finally:
                os.close(file)
            self._files.append((address, str(path)))
            address += layout.shard_rows * layout.row_nbytes

    def gather(self, rows: NDArray[np.int64], out: torch.Tensor) -> None:
        """Copy rows to where they are wanted.

        Args:
            rows: their numbers, sequence times context length plus position.
            out: uint8 [len(rows), nbytes of a row], contiguous.

        Raises:
            StorageError: a file has become shorter since it was mapped.
        """
        if self._gaps is not None:
            rows = rows + self._gaps[np.searchsorted(self._ends, rows, side="right")]
        select(self._memory, rows, out)
        if self._faults:
            raise self._error()

    def _error(self) -> StorageError:
        address = self._faults[0]
        path = max((start, path) for start, path in self._files if start <= address)[1]
        return StorageError(
            f"{path} has become shorter while it was read; the store is damaged: run `actstore verify {self._url}`"
        )

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """As `RowSource.need`; all of them are here."""

    def close(self) -> None:
        """Give the addresses back. Nothing may be gathered afterwards, or meanwhile."""
        self._finalizer()


def _release(on_fault: Any, base: int, nbytes: int) -> None:
    mapping.release(base, nbytes)
    mapping.forget(on_fault)


def _n_maps() -> int:
    with Path("/proc/self/maps").open("rb") as maps:
        return sum(1 for _ in maps)


def _tensor_at(address: int, n_rows: int, row_nbytes: int) -> torch.Tensor:
    memory = (ctypes.c_ubyte * (n_rows * row_nbytes)).from_address(address)
    return torch.from_numpy(np.ctypeslib.as_array(memory)).view(n_rows, row_nbytes)

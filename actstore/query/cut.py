"""A part of a stored array, and its bytes."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from actstore.query.selection import Rows, text_of
from actstore.storage.blobs import view
from actstore.storage.local import LocalBlobs
from actstore.store.reading.rows import Rows as StoredRows
from actstore.store.reading.sections import PIECE_NBYTES as READ_AT_ONCE_NBYTES

PIECE_NBYTES: Final = 2 << 20
"""About so much is read, and sent, at once. A sequence is never divided."""

_READ_NBYTES: Final = 128 << 20
"""The most that is read for a piece, where little of each sequence is asked for."""

_READERS: Final = 16
"""Threads that read together, at most."""


@dataclass(frozen=True)
class Cut:
    """Sequences x positions x elements of an array, in C order."""

    name: str
    """Of the hook, or of the array of tokens."""
    stored: StoredRows
    sequences: Rows
    inner: tuple[Rows, ...]
    """Positions, then the axes of the hook; nothing for an array of one axis."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sequences), *(len(each) for each in self.inner))

    @property
    def dtype(self) -> str:
        """Name of the type of the elements."""
        return self.stored.dtype

    @property
    def row_nbytes(self) -> int:
        """Bytes of what is asked for of one sequence."""
        return math.prod(self.shape[1:]) * self.stored.storage.itemsize

    @property
    def nbytes(self) -> int:
        return len(self.sequences) * self.row_nbytes

    @property
    def text(self) -> str:
        """What is asked for, in one spelling."""
        return f"{self.name}[{';'.join(map(text_of, (self.sequences, *self.inner)))}]"

    @property
    def piece_rows(self) -> int:
        """Sequences that are read at once."""
        whole = self.stored.layouts[0].row_nbytes
        return max(1, min(PIECE_NBYTES // max(1, self.row_nbytes), _READ_NBYTES // max(1, whole)))

    @property
    def held_nbytes(self) -> int:
        """Memory that it takes to read it piece by piece: the one that is sent, the one after it, the end of the one
        before, and what a piece is made from. Nothing, where files are mapped.
        """
        stored, rows = self.stored, self.sequences
        layouts = stored.layouts
        is_compressed = any(layout.compression is not None for layout in layouts)
        is_local = isinstance(stored.blobs, LocalBlobs)
        if is_local and not is_compressed and not self._is_cut and isinstance(rows, range) and rows.step == 1:
            return 0
        n_rows = min(self.piece_rows, len(rows))
        pieces = min(self.nbytes, 3 * n_rows * self.row_nbytes)
        around = n_rows * math.prod(_size_around(each) for each in self.inner) * stored.storage.itemsize
        source = 0
        if is_compressed or not is_local:
            whole = n_rows * max(layout.row_nbytes for layout in layouts)
            source = min(whole if self._is_cut else 0, _READERS * READ_AT_ONCE_NBYTES)
            if is_compressed:
                source += max(layout.chunk_nbytes for layout in layouts)
        return pieces + (around if self._is_cut else 0) + source

    @cached_property
    def _is_cut(self) -> bool:
        """Whether more is read than asked for."""
        wanted = zip(self.inner, self.stored.shape[1:], strict=True)
        return any(not isinstance(each, range) or len(each) != size for each, size in wanted)

    def read(self, start: int, stop: int) -> tuple[memoryview, int]:
        """Bytes of the first of some sequences, which are counted within the cut.

        Returns:
            The bytes, and of how many sequences they are: as many as are mapped in one file, or `piece_rows`.

        Raises:
            NotCommittedError: one is not committed.
            StorageError: it cannot be read.
        """
        rows = self.sequences[start:stop]
        if not self._is_cut and isinstance(rows, range) and rows.step == 1:
            found = self.stored.as_stored(rows)
            if found is not None:
                return view(found), len(found) // self.row_nbytes
        values = self._values(rows[: self.piece_rows])
        data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return data, min(self.piece_rows, len(rows))

    def _values(self, rows: Rows) -> Any:
        key: Any = slice(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows
        # Lists would be paired by NumPy where they are crossed here, so each axis is read as the slice around it.
        around = [_around(each) for each in self.inner]
        values = self.stored[(key, *around)]
        for axis, each in enumerate(self.inner, 1):
            if not isinstance(each, range):
                low = int(each.min()) if len(each) else 0
                values = np.take(values, each - low, axis=axis)
        return values


def _size_around(each: Rows) -> int:
    around = _around(each)
    return len(each) if isinstance(each, range) else around.stop - around.start


def _around(each: Rows) -> slice:
    if isinstance(each, range):
        return slice(each.start, each.stop, each.step)
    return slice(int(each.min()), int(each.max()) + 1) if len(each) else slice(0, 0)

"""A part of a stored array that a request asks for, and its bytes."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from actstore.query.selection import Indices, text_of
from actstore.storage.blobs import view
from actstore.store.reading.rows import Rows
from actstore.store.reading.sections import PIECE_NBYTES as SECTION_PIECE_NBYTES

PIECE_NBYTES: Final = 2 << 20
"""Bytes that are read, and sent, at once, roughly. A sequence is never divided."""

_READ_NBYTES: Final = 128 << 20
"""Bytes that are read for one piece at most, where a request wants little of each sequence."""

_READERS: Final = 16
"""Threads that read together at most."""


@dataclass(frozen=True)
class Cut:
    """A part of an array: some sequences x some positions x some elements, in C order."""

    name: str
    """Name of the hook, or of the array of tokens."""
    stored: Rows
    sequences: Indices
    inner: tuple[Indices, ...]
    """Positions, then the axes of the hook; nothing for an array of one axis."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sequences), *(len(indices) for indices in self.inner))

    @property
    def dtype(self) -> str:
        """Name of the type of the elements."""
        return self.stored.dtype

    @property
    def row_nbytes(self) -> int:
        """Bytes of one sequence within the cut."""
        return math.prod(self.shape[1:]) * self.stored.storage.itemsize

    @property
    def nbytes(self) -> int:
        return len(self.sequences) * self.row_nbytes

    @property
    def text(self) -> str:
        """The cut as text, in one spelling."""
        return f"{self.name}[{';'.join(map(text_of, (self.sequences, *self.inner)))}]"

    @property
    def piece_rows(self) -> int:
        """Sequences that are read at once at most."""
        whole = self.stored.layouts[0].row_nbytes
        return max(1, min(PIECE_NBYTES // max(1, self.row_nbytes), _READ_NBYTES // max(1, whole)))

    @property
    def held_nbytes(self) -> int:
        """Bytes of memory that reading piece by piece takes: the piece being sent, the one after it, the end of the one
        before, and what a piece is made from. 0 where files are mapped.
        """
        stored, rows = self.stored, self.sequences
        layouts = stored.layouts
        is_compressed = any(layout.compression is not None for layout in layouts)
        is_local = stored.blobs.is_local
        if is_local and not is_compressed and not self._is_cut and isinstance(rows, range) and rows.step == 1:
            return 0
        n_rows = min(self.piece_rows, len(rows))
        pieces = min(self.nbytes, 3 * n_rows * self.row_nbytes)
        around = n_rows * math.prod(_size_around(indices) for indices in self.inner) * stored.storage.itemsize
        source = 0
        if is_compressed or not is_local:
            whole = n_rows * max(layout.row_nbytes for layout in layouts)
            source = min(whole if self._is_cut else 0, _READERS * SECTION_PIECE_NBYTES)
            if is_compressed:
                source += max(layout.chunk_nbytes for layout in layouts)
        return pieces + (around if self._is_cut else 0) + source

    @cached_property
    def _is_cut(self) -> bool:
        """Whether the positions or elements are not whole slices of their axes."""
        wanted = zip(self.inner, self.stored.shape[1:], strict=True)
        return any(not isinstance(indices, range) or len(indices) != size for indices, size in wanted)

    def read(self, start: int, stop: int) -> tuple[memoryview, int]:
        """Read the first of some sequences, which are counted within the cut.

        Returns:
            The bytes, and the number of sequences that they hold: as many as are mapped in one file, or `piece_rows`.

        Raises:
            NotCommittedError: a sequence is not committed.
            StorageError: a sequence cannot be read.
        """
        rows = self.sequences[start:stop]
        if not self._is_cut and isinstance(rows, range) and rows.step == 1:
            mapped = self.stored.as_stored(rows)
            if mapped is not None:
                return view(mapped), len(mapped) // self.row_nbytes
        values = self._values(rows[: self.piece_rows])
        data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return data, min(self.piece_rows, len(rows))

    def _values(self, rows: Indices) -> Any:
        key: Any = slice(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows
        # NumPy would pair lists of different axes, so each axis is read as the slice around its indices.
        around = [_around(indices) for indices in self.inner]
        values = self.stored[(key, *around)]
        for axis, indices in enumerate(self.inner, 1):
            if not isinstance(indices, range):
                low = int(indices.min()) if len(indices) else 0
                values = np.take(values, indices - low, axis=axis)
        return values


def _size_around(indices: Indices) -> int:
    around = _around(indices)
    return len(indices) if isinstance(indices, range) else around.stop - around.start


def _around(indices: Indices) -> slice:
    if isinstance(indices, range):
        return slice(indices.start, indices.stop, indices.step)
    return slice(int(indices.min()), int(indices.max()) + 1) if len(indices) else slice(0, 0)

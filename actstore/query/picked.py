"""Single rows of a stored array, which lie anywhere in it, and their bytes."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.query.cut import PIECE_NBYTES
from actstore.store.reading.rows import GATHERED_NBYTES, REQUESTS, Rows
from actstore.store.reading.sections import PIECE_NBYTES as SECTION_PIECE_NBYTES

_PIECE_ROWS: Final = 1024
"""Rows that are read, and sent, at once at most: each may be a read of its own."""


@dataclass(frozen=True)
class Picked:
    """Rows of an array [sequence, entry, ...], in C order."""

    name: str
    """Name of the hook, or of the array of tokens."""
    stored: Rows
    sequences: NDArray[np.int64]
    """Sequence of each row, [n]."""
    entries: NDArray[np.int64]
    """Number of each row along the second axis, [n]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sequences), *self.stored.shape[2:])

    @property
    def dtype(self) -> str:
        """Name of the type of the elements."""
        return self.stored.dtype

    @cached_property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.stored.shape[2:]) * self.stored.storage.itemsize

    @property
    def nbytes(self) -> int:
        return len(self.sequences) * self.row_nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes of memory that reading piece by piece takes: the piece being sent, the one after it, the end of the one
        before, and what a piece is made from.
        """
        layouts = self.stored.layouts
        pieces = min(self.nbytes, 3 * max(PIECE_NBYTES, self.row_nbytes))
        if any(layout.compression is not None for layout in layouts):
            whole = max(layout.row_nbytes + layout.chunk_nbytes for layout in layouts)
            return pieces + max(GATHERED_NBYTES, whole)
        reads = 1 if self.stored.blobs.is_local else min(REQUESTS, len(self.sequences))
        return pieces + reads * max(SECTION_PIECE_NBYTES, self.row_nbytes)

    def read(self, start: int, stop: int) -> tuple[memoryview, int]:
        """Read the first of some rows, which are counted within the picked ones.

        Returns:
            The bytes, and the number of rows that they hold.

        Raises:
            NotCommittedError: a row is not committed.
            StorageError: a row cannot be read.
        """
        n_rows = min(stop - start, _PIECE_ROWS, max(1, PIECE_NBYTES // self.row_nbytes))
        span = slice(start, start + n_rows)
        values = self.stored.gather(self.sequences[span], self.entries[span])
        return memoryview(values.reshape(-1).view(np.uint8).data), n_rows

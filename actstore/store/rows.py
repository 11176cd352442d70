"""Rows of one array, as NumPy arrays in the storage type."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import NotCommittedError
from actstore.store.blobs import BlobNotFoundError, Blobs
from actstore.store.dtypes import dtype
from actstore.store.layout import ArrayLayout, RowRange


class Rows:
    """Reads an array as ``rows[key]`` with NumPy's basic indexing, and lists of rows on the first axis.

    Only the rows asked for are read: one range of bytes for each run of neighbouring rows in a shard.
    """

    def __init__(self, blobs: Blobs, layout: ArrayLayout, is_committed: Callable[[int], bool]) -> None:
        self.layout = layout
        self._blobs = blobs
        self._is_committed = is_committed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    def __len__(self) -> int:
        return self.layout.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        del copy  # reading always makes a new array
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Rows, in the storage type (bfloat16 as uint16).

        Raises:
            IndexError: a row outside of the array.
            NotCommittedError: a row whose segment is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        row_key, inner_key = _split(key, ndim=len(self.layout.shape))
        rows = _row_numbers(row_key, self.layout.shape[0])
        inner = (slice(None), *inner_key)
        # An array of the right shape that takes no memory.
        like = np.broadcast_to(np.zeros((), dtype(self.layout.dtype).storage), (1, *self.layout.shape[1:]))[
            inner
        ]
        values = np.empty((len(rows), *like.shape[1:]), like.dtype)
        done = 0
        for piece in self._pieces(rows):
            # Copied at once: each piece may be a map of a file, and there can be as many as rows.
            values[done : done + len(piece)] = piece[inner]
            done += len(piece)
        return values[0] if isinstance(row_key, int | np.integer) else values

    def _pieces(self, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """The rows, one piece for each run of consecutive numbers within a shard."""
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for run in np.split(rows, breaks):
            if len(run):
                for part in self.layout.split(int(run[0]), int(run[-1]) + 1):
                    yield self._read(part)

    def _read(self, part: RowRange) -> NDArray[Any]:
        layout = self.layout
        if not self._is_committed(part.shard):
            raise NotCommittedError(
                f"rows {part.first_row}:{part.first_row + part.n_rows} of {layout.path} (segment {part.shard}) "
                f"are not committed in {self._blobs.url}; run the extraction again to complete them"
            )
        start = part.start * layout.row_nbytes
        try:
            data = self._blobs.read(layout.key(part.shard), start, part.n_rows * layout.row_nbytes)
        except BlobNotFoundError as error:
            # A committed shard that is gone must never look like one that was not written yet.
            raise BlobNotFoundError(
                f"{self._blobs.url}/{layout.key(part.shard)} is committed but missing; the store is damaged"
            ) from error
        values = np.frombuffer(data, dtype=dtype(layout.dtype).storage)
        return values.reshape(part.n_rows, *layout.shape[1:])


def _split(key: Any, ndim: int) -> tuple[Any, tuple[Any, ...]]:
    """An index as (first axis, all other axes), without an ellipsis."""
    parts = list(key) if isinstance(key, tuple) else [key]
    ellipses = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    if ellipses:
        fill = ndim - (len(parts) - 1)
        parts[ellipses[0] : ellipses[0] + 1] = [slice(None)] * fill
    if len(parts) > ndim:
        raise IndexError(f"too many indices: the array has {ndim} axes, {len(parts)} were indexed")
    row, inner = (parts[0], tuple(parts[1:])) if parts else (slice(None), ())
    basic = (slice, int, np.integer)
    # NumPy pairs two lists, where ours would cross; and it moves the axis of a list that an integer precedes.
    late = inner if not isinstance(row, basic) else inner[1:] if not isinstance(row, slice) else ()
    if not all(isinstance(part, basic) for part in late):
        raise IndexError("only one axis can be indexed by a list; index the result for the other")
    return row, inner


def _row_numbers(key: Any, n_rows: int) -> NDArray[np.int64]:
    if isinstance(key, slice):
        return np.arange(*key.indices(n_rows), dtype=np.int64)
    rows = np.atleast_1d(np.asarray(key))
    if rows.dtype == bool:
        if rows.shape != (n_rows,):
            raise IndexError(f"a mask of rows must have shape ({n_rows},), got {rows.shape}")
        return np.flatnonzero(rows)
    if rows.size == 0:
        return np.empty(0, dtype=np.int64)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise IndexError(f"rows are chosen by an integer, a slice, or a list of integers, not {key!r}")
    rows = rows.astype(np.int64)
    outside = rows[(rows < -n_rows) | (rows >= n_rows)]
    if outside.size:
        raise IndexError(f"row {outside[0]} is out of bounds for {n_rows} rows")
    return np.where(rows < 0, rows + n_rows, rows)

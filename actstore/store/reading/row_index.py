"""Parses the index of ``rows[key]`` as NumPy does, before anything is read."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Selection = range | NDArray[np.int64]
"""Numbers of rows. A range never goes backwards, and takes no memory."""


@dataclass(frozen=True)
class RowIndex:
    """An index, split into its first axis and all others."""

    rows: Selection
    is_single: bool
    """Whether the first axis is indexed by an integer, and so dropped."""
    is_reversed: bool
    """Whether the result has the rows backwards."""
    inner: tuple[Any, ...]
    """Index for an array of the rows: all of the first axis, and the given index of the others."""
    inner_shape: tuple[int, ...]
    """Shape of one row of the result."""
    is_whole: bool
    """Whether the result has every row whole, as it lies in storage."""
    span: range | None
    """The positions of the result, if they are neighbours and not all; None otherwise."""
    within_span: tuple[Any, ...]
    """Like ``inner``, for rows of which only the span was read."""
    span_is_whole: bool
    """Whether the result has all of the span, as it lies in storage."""

    @property
    def result_shape(self) -> tuple[int, ...]:
        return self.inner_shape if self.is_single else (len(self.rows), *self.inner_shape)

    @classmethod
    def parse(cls, key: Any, shape: tuple[int, ...]) -> "RowIndex":
        """Parse an index of an array.

        Raises:
            IndexError: this is not an index of an array of this shape.
        """
        if type(key) is int:
            return cls._row(_inside(key, shape[0]), shape[1:])
        row_key, inner_key = _split(key, ndim=len(shape))
        rows, is_reversed = _rows(row_key, shape[0])
        inner = (slice(None), *inner_key)
        if all(isinstance(part, slice) and part == slice(None) for part in inner_key):
            inner_shape, is_whole = shape[1:], True
        else:
            inner_shape = _like(shape[1:])[inner].shape[1:]
            is_whole = _is_all(inner_key, shape[1:])
        span = _span(inner_key[0], shape[1]) if inner_key else None
        first = 0 if inner_key and not isinstance(inner_key[0], slice) else slice(None)
        return cls(
            rows=rows,
            is_single=isinstance(row_key, int | np.integer),
            is_reversed=is_reversed,
            inner=inner,
            inner_shape=inner_shape,
            is_whole=is_whole,
            span=span,
            within_span=(slice(None), first, *inner_key[1:]),
            span_is_whole=_is_all(inner_key[1:], shape[2:]),
        )

    @classmethod
    def _row(cls, row: int, inner_shape: tuple[int, ...]) -> "RowIndex":
        """The index of one whole row, which is the most frequent one."""
        return cls(
            rows=range(row, row + 1),
            is_single=True,
            is_reversed=False,
            inner=(slice(None),),
            inner_shape=inner_shape,
            is_whole=True,
            span=None,
            within_span=(slice(None), slice(None)),
            span_is_whole=True,
        )


@functools.lru_cache(maxsize=64)
def _like(row_shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """An array of one row that takes no memory."""
    return np.broadcast_to(np.zeros((), bool), (1, *row_shape))


def _is_all(key: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    return all(
        isinstance(part, slice) and part.indices(n) == (0, n, 1)
        for part, n in zip(key, shape, strict=False)  # axes that are not named are whole
    )


def _span(key: Any, n_positions: int) -> range | None:
    if isinstance(key, slice):
        span = range(*key.indices(n_positions))
        return span if span.step == 1 and 0 < len(span) < n_positions else None
    if isinstance(key, int | np.integer):
        position = int(key) % n_positions
        return range(position, position + 1)
    return None


def _split(key: Any, ndim: int) -> tuple[Any, tuple[Any, ...]]:
    """Split an index into (first axis, all other axes), without an ellipsis."""
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
    # NumPy pairs two lists, while we would combine them; and it moves the axis of a list that follows an integer.
    late = inner if not isinstance(row, basic) else inner[1:] if not isinstance(row, slice) else ()
    if not all(isinstance(part, basic) for part in late):
        raise IndexError("only one axis can be indexed by a list; index the result for the other")
    return row, inner


def _rows(key: Any, n_rows: int) -> tuple[Selection, bool]:
    """The rows in the order in which they are read, and whether the result has them backwards."""
    if isinstance(key, slice):
        rows = range(*key.indices(n_rows))
        return (rows, False) if rows.step > 0 else (rows[::-1], True)
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        row = _inside(int(key), n_rows)
        return range(row, row + 1), False
    return _listed(key, n_rows), False


def _inside(row: int, n_rows: int) -> int:
    if not -n_rows <= row < n_rows:
        raise IndexError(f"sequence {row} is out of bounds for {n_rows} sequences")
    return row % n_rows


def _listed(key: Any, n_rows: int) -> NDArray[np.int64] | range:
    rows = np.atleast_1d(np.asarray(key))
    if rows.dtype == bool:
        if rows.shape != (n_rows,):
            raise IndexError(f"a mask of sequences must have shape ({n_rows},), got {rows.shape}")
        rows = np.flatnonzero(rows)
    if rows.size == 0:
        return range(0)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise IndexError(f"sequences are chosen by an integer, a slice, or a list of integers, not {key!r}")
    rows = rows.astype(np.int64)
    outside = rows[(rows < -n_rows) | (rows >= n_rows)]
    if outside.size:
        raise IndexError(f"sequence {outside[0]} is out of bounds for {n_rows} sequences")
    return np.where(rows < 0, rows + n_rows, rows)

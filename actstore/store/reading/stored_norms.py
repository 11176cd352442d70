"""The stored norms of one hook, indexed like an array."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import HookError
from actstore.store.reading.row_index import RowIndex, Selection
from actstore.store.reading.rows import Rows


@dataclass(frozen=True)
class NormsOfPart:
    """The norms of a hook over the tokens of one part of a store."""

    n_sequences: int
    rows: Rows | None
    """Norms [n_sequences, hooks, context_length] of all hooks of a run; None where those of the hook are not stored."""
    number: int
    """Number of the hook along the axis of hooks."""


class StoredNorms:
    """``norms[sequences, positions]`` is the Euclidean norm of each row of a hook, over all of its axes: that of the
    stored values, rounded to float32. It is NaN for padding, and for rows with NaN.

    Runs of old versions have no norms, and neither have hooks whose rows are not vectors: attention patterns and
    scores, and single numbers.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, hook: str, shape: tuple[int, int], parts: Sequence[NormsOfPart]) -> None:
        """
        Args:
            hook: name of the hook.
            shape: (sequences, positions) of the store.
            parts: norms of the parts of the store, in order.
        """
        self.hook = hook
        self.shape = shape
        self._parts = tuple(parts)
        self._starts = (0, *itertools.accumulate(part.n_sequences for part in parts))
        """First sequence of each part, and last the number of all sequences."""

    @property
    def ranges(self) -> tuple[range, ...]:
        """The sequences whose norms are stored, committed or not: one range for each part that has norms."""
        return tuple(
            range(start, start + part.n_sequences)
            for part, start in zip(self._parts, self._starts, strict=False)
            if part.rows is not None
        )

    @property
    def row_nbytes(self) -> int:
        """The most bytes that are read for a sequence, which include the norms of the other hooks."""
        layouts = (layout for part in self._parts if part.rows is not None for layout in part.rows.layouts)
        return max((layout.row_nbytes for layout in layouts), default=0)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        del copy  # reading always makes a new array
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Read norms, with an index as for `Rows`.

        Raises:
            HookError: the norms of some of these sequences are not stored.
            IndexError: the index is outside of the array.
            NotCommittedError: the segment of a row is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        index = RowIndex.parse(key, self.shape)
        pieces = list(self._pieces(index.rows))
        for part, _, _ in pieces:
            if self._parts[part].rows is None:
                raise self._absent(part)
        blocks = [(at, self._read(part, rows)) for part, rows, at in pieces]
        norms = np.empty((sum(len(block) for _, block in blocks), self.shape[1]), np.float32)
        for at, block in blocks:
            norms[at] = block
        values: NDArray[np.float32] = norms[index.inner]
        if index.is_reversed:
            values = values[::-1]
        return values[0] if index.is_single else values

    def _pieces(self, rows: Selection) -> Iterator[tuple[int, Selection, slice | NDArray[np.int64]]]:
        """(number of a part, rows counted within it, where they go) for each part that has some of the rows."""
        for number, start in enumerate(self._starts[:-1]):
            stop = self._starts[number + 1]
            if isinstance(rows, range):
                # Indices of the first row at or behind each end of the part.
                first, last = (-(-(end - rows.start) // rows.step) for end in (start, stop))
                at = slice(min(max(first, 0), len(rows)), min(max(last, 0), len(rows)))
                inside = rows[at]
                if inside:
                    yield number, range(inside.start - start, inside.stop - start, inside.step), at
            else:
                (places,) = np.nonzero((rows >= start) & (rows < stop))
                if len(places):
                    yield number, rows[places] - start, places

    def _read(self, part: int, rows: Selection) -> NDArray[np.float32]:
        norms_of_part = self._parts[part]
        assert norms_of_part.rows is not None
        key: Any = slice(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows
        norms: NDArray[np.float32] = norms_of_part.rows[key, norms_of_part.number]
        return norms

    def _absent(self, part: int) -> HookError:
        start, stop = self._starts[part], self._starts[part + 1]
        return HookError(
            f"norms of {self.hook} are not stored of the sequences {start}:{stop}: a version of actstore that stored "
            "none made them, or its rows are no vectors; compute them from the activations"
        )

    def __repr__(self) -> str:
        return f"<StoredNorms {self.hook} {self.shape}>"

"""Joins the parts of an array that different runs wrote to one array of rows."""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from actstore.store.format.layout import ArrayLayout, RowRange
from actstore.store.reading.row_index import Selection

PIECE_NBYTES: Final = 8 << 20
"""The most bytes of one read; larger ones are cut, so that threads can share them."""


@dataclass(frozen=True)
class Section:
    """Consecutive rows of an array that one run wrote (or has yet to write)."""

    layout: ArrayLayout
    is_committed: Callable[[int], bool]
    """Whether a shard of this layout is committed, by number of the shard."""
    why_absent: str = ""
    """Reason, or advice, in the error for a row that is not committed."""
    nbytes_of: Callable[[int], int] | None = None
    """Size in bytes of a shard's object where the array is compressed; None requests it once a shard."""


@dataclass(frozen=True)
class Piece:
    """Rows of one shard, and their place in the result."""

    section: int
    rows: RowRange
    at: int
    """First row of the result."""


class Sections:
    """Finds the shards of the rows of the whole array."""

    def __init__(self, layouts: Sequence[ArrayLayout]) -> None:
        self._layouts = tuple(layouts)
        self.starts = (0, *itertools.accumulate(layout.shape[0] for layout in layouts))
        """First row of each section, and last the number of all rows."""
        self.max_rows = tuple(_piece_rows(layout) for layout in layouts)
        """The most rows that are read at once, by section."""

    def shards(self, rows: Selection) -> Iterator[tuple[int, RowRange]]:
        """Every section and shard with some of the rows, and rows in it; a shard may come more than once."""
        if not isinstance(rows, range) or rows.step == 1:
            yield from ((piece.section, piece.rows) for piece in self.pieces(rows, None))
            return
        at = 0
        while at < len(rows):
            section, row = self.find(rows[at])
            layout = self._layouts[section]
            shard, within = divmod(row, layout.shard_rows)
            yield section, RowRange(shard, within, 1, row)
            # This goes on to the first row past the shard, since it may have very many of the rows.
            end = self.starts[section] + min((shard + 1) * layout.shard_rows, layout.shape[0])
            at += -(-(end - rows[at]) // rows.step)

    def find(self, row: int) -> tuple[int, int]:
        """The section of a row, and the number of the row in it."""
        section = bisect.bisect_right(self.starts, row) - 1
        return section, row - self.starts[section]

    def one_piece(self, rows: Selection) -> Piece | None:
        """All of the rows as one piece, if they are few neighbours in one shard; None otherwise."""
        if not isinstance(rows, range) or rows.step != 1 or not rows:
            return None
        section, row = self.find(rows.start)
        shard, within = divmod(row, self._layouts[section].shard_rows)
        n_rows = len(rows)
        is_in_shard = within + n_rows <= self._layouts[section].rows_in(shard)
        if not is_in_shard or n_rows > self.max_rows[section]:
            return None
        return Piece(section, RowRange(shard, within, n_rows, row), 0)

    def pieces(self, rows: Selection, max_rows: Sequence[int] | None) -> Iterator[Piece]:
        """The rows in order: one piece for each run of neighbours in a shard.

        Args:
            rows: numbers of the rows.
            max_rows: the most rows of a piece, by section; None for any number.
        """
        at = 0
        for start, stop in _runs(rows):
            row = start
            while row < stop:
                section, first = self.find(row)
                end = min(stop, self.starts[section + 1]) - self.starts[section]
                for part in self._layouts[section].split(first, end):
                    for piece in _cut(part, part.n_rows if max_rows is None else max_rows[section]):
                        yield Piece(section, piece, at)
                        at += piece.n_rows
                row = self.starts[section] + end


def _piece_rows(layout: ArrayLayout) -> int:
    """Rows that are read at once: whole chunks where they are compressed, so that none is decompressed twice."""
    n_rows = max(1, PIECE_NBYTES // layout.row_nbytes)
    if layout.compression is None:
        return n_rows
    return max(1, n_rows // layout.chunk_rows) * layout.chunk_rows


def _runs(rows: Selection) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive numbers, in order."""
    if isinstance(rows, range):
        if rows.step == 1:
            yield rows.start, rows.stop
        else:
            yield from ((row, row + 1) for row in rows)
        return
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    firsts, lasts = rows[np.concatenate([[0], breaks])], rows[np.concatenate([breaks - 1, [-1]])]
    yield from zip(firsts.tolist(), (lasts + 1).tolist(), strict=True)


def _cut(part: RowRange, max_rows: int) -> Iterator[RowRange]:
    """Cut rows at multiples of ``max_rows``, counted from the start of the shard."""
    if part.n_rows <= 1:
        yield part
        return
    start, stop = part.start, part.start + part.n_rows
    while start < stop:
        end = min(stop, (start // max_rows + 1) * max_rows)
        yield RowRange(part.shard, start, end - start, part.first_row + start - part.start)
        start = end

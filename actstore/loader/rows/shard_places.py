"""Computing which shard a row is in."""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.layout import ArrayLayout


class ShardPlaces:
    """The shards of all sections of an array, numbered consecutively.

    The shard of a row is found by division: a binary search among 20,000 shards takes a third of the time of the gather
    itself.
    """

    def __init__(self, layouts: Sequence[ArrayLayout]) -> None:
        """
        Args:
            layouts: the sections of the array, in order.
        """
        self.layouts = tuple(layouts)
        length = layouts[0].shape[1]
        self.row_nbytes = layouts[0].row_nbytes // length
        """Bytes of a row, which is one position of a sequence."""
        counts = [layout.n_shards for layout in layouts]
        self.n_shards = sum(counts)
        self._firsts = [0, *itertools.accumulate(counts)]
        self._shard_rows = _int64([layout.shard_rows * length for layout in layouts])
        n_rows = _int64([layout.shape[0] * length for layout in layouts])
        self._ends: NDArray[np.int64] = np.cumsum(n_rows)
        # The first row of the array's first shard, if all shards were as large as those of the section.
        self._origins = self._ends - n_rows - _int64(self._firsts[:-1]) * self._shard_rows
        self.sections = np.repeat(np.arange(len(counts)), counts)
        """The section of each shard."""
        shards = np.arange(self.n_shards)
        self.first_rows = self._origins[self.sections] + shards * self._shard_rows[self.sections]
        """The first row of each shard."""
        self.data_nbytes = _int64([layout.data_nbytes(0) for layout in layouts])[self.sections]
        """Bytes of the rows of each shard, uncompressed."""
        self.data_nbytes[_int64(self._firsts[1:]) - 1] = [
            layout.data_nbytes(layout.n_shards - 1) for layout in layouts
        ]
        self.nbytes = self.data_nbytes + _int64([layout.index_nbytes for layout in layouts])[self.sections]
        """Bytes of the file of each shard."""

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each row; a row is its sequence times context length plus its position."""
        if len(self.layouts) == 1:
            return rows // int(self._shard_rows[0])
        section = np.searchsorted(self._ends, rows, side="right")
        shards: NDArray[np.int64] = (rows - self._origins[section]) // self._shard_rows[section]
        return shards

    def at(self, shard: int) -> tuple[ArrayLayout, int]:
        """(section of a shard, number of the shard in it)."""
        section = bisect.bisect_right(self._firsts, shard) - 1
        return self.layouts[section], shard - self._firsts[section]

    def key(self, shard: int) -> str:
        layout, number = self.at(shard)
        return layout.key(number)


def _int64(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)

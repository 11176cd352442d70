"""A plan to read entries that lie anywhere in an array: neighbours together, each byte at most once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.layout import ArrayLayout
from actstore.store.reading.sections import PIECE_NBYTES


@dataclass(frozen=True)
class ScatteredRead:
    """One range of bytes of a shard, and the entries that are in it."""

    section: int
    shard: int
    first_row: int
    """First sequence of the section that is read."""
    start: int
    """First byte in the shard."""
    nbytes: int
    """Bytes from there on."""
    wanted: NDArray[np.int64]
    """Which of the wanted entries are in the range."""
    at: NDArray[np.int64]
    """The place of each of them in the range, in entries."""


def scattered_reads(
    layouts: Sequence[ArrayLayout],
    sequences: NDArray[np.int64],
    entries: NDArray[np.int64],
    *,
    gap_nbytes: int,
) -> Iterator[ScatteredRead]:
    """Ranges that hold entries of uncompressed arrays, in the order of storage.

    Args:
        layouts: sections of the array, in order.
        sequences: sequence of each entry, [n].
        entries: number of each entry within its sequence, [n].
        gap_nbytes: unwanted bytes up to which two ranges become one.
    """
    first = 0
    for number, layout in enumerate(layouts):
        entry_nbytes = layout.row_nbytes // layout.shape[1]
        (here,) = np.nonzero((sequences >= first) & (sequences < first + layout.shape[0]))
        rows = sequences[here] - first
        first += layout.shape[0]
        shards, within = np.divmod(rows, layout.shard_rows)
        places = within * layout.shape[1] + entries[here]  # in entries, from the start of the shard
        order = np.lexsort((places, shards))
        here, rows, shards, places = here[order], rows[order], shards[order], places[order]
        apart = (np.diff(shards) != 0) | (np.diff(places) - 1 > gap_nbytes // entry_nbytes)
        most = max(1, PIECE_NBYTES // entry_nbytes)
        for part in np.split(np.arange(len(here)), np.flatnonzero(apart) + 1):
            # A long range is cut where it would be larger than a piece.
            pieces = (places[part] - places[part[0]]) // most if len(part) else part
            for piece in np.split(part, np.flatnonzero(np.diff(pieces)) + 1):
                if len(piece):
                    start, stop = int(places[piece[0]]), int(places[piece[-1]]) + 1
                    yield ScatteredRead(
                        section=number,
                        shard=int(shards[piece[0]]),
                        first_row=int(rows[piece[0]]),
                        start=start * entry_nbytes,
                        nbytes=(stop - start) * entry_nbytes,
                        wanted=here[piece],
                        at=places[piece] - start,
                    )

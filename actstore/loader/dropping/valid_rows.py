"""Counting and finding the rows that are not dropped: how many there are before a row, and which one is the k-th."""

from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

_WORDS: Final = 8
"""Words in a block. A block is one cache line."""
_BITS: Final = 64
_BLOCK: Final = _WORDS * _BITS
_HINT: Final = 512
"""Number of valid rows per hint; a hint says in which block to begin looking."""
_STEPS: Final = 2
"""Blocks that are tried one after the other from the hint: enough if half of the rows are valid. Where fewer are, a
binary search follows.
"""
_ONE: Final = np.uint64(1)

# Masks to count the bits of each byte of a word side by side: Warren, "Hacker's Delight", section 5-1.
_PAIRS: Final = np.uint64(0x5555555555555555)
_FOURS: Final = np.uint64(0x3333333333333333)
_BYTES: Final = np.uint64(0x0F0F0F0F0F0F0F0F)
_ONES: Final = np.uint64(0x0101010101010101)
_HIGHS: Final = np.uint64(0x8080808080808080)
_LAST: Final = np.uint64(0xFF)


class ValidRows(Protocol):
    """A subset of the rows ``0 ... n_rows - 1``, in ascending order."""

    n_rows: int
    """Number of all rows, dropped ones included."""
    n_valid: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this takes."""

    @property
    def checksum(self) -> int:
        """A checksum of which rows are valid. It is comparable only between subsets of equally many rows."""

    def select(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The valid rows with these ranks, which are 0 to n_valid - 1."""

    def rank(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many valid rows there are before each row, which is 0 to n_rows."""


class AllRows:
    """A subset that is all rows."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = self.n_valid = n_rows
        self.nbytes = self.checksum = 0

    def select(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        return ranks

    def rank(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows


class SamePositions:
    """A subset that has the same positions of every sequence."""

    def __init__(self, n_sequences: int, is_valid: NDArray[np.bool_]) -> None:
        """
        Args:
            is_valid: whether each position is kept, [context_length].
        """
        self._length = len(is_valid)
        self._positions = np.flatnonzero(is_valid)
        self._before = np.concatenate([[0], np.cumsum(is_valid)])
        self.n_rows = n_sequences * self._length
        self.n_valid = n_sequences * len(self._positions)
        self.nbytes = self._positions.nbytes + self._before.nbytes
        self.checksum = crc32c(np.packbits(is_valid, bitorder="little").data)

    def select(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        sequences, within = np.divmod(ranks, len(self._positions))
        return sequences * self._length + self._positions[within]

    def rank(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        sequences, positions = np.divmod(rows, self._length)
        before: NDArray[np.int64] = self._before[positions]
        return sequences * len(self._positions) + before


class MarkedRows:
    """Any subset of rows: one bit per row, and half a bit for counts."""

    def __init__(self, n_rows: int, masks: Iterator[NDArray[np.bool_]]) -> None:
        """
        Args:
            n_rows: the number of all rows.
            masks: True where a row is valid, in order of the rows, in pieces of any size.
        """
        self.n_rows = n_rows
        n_blocks = n_rows // _BLOCK + 1  # one block more, so that rank(n_rows) needs no special case
        bits = np.zeros(n_blocks * _BLOCK // 8, np.uint8)
        at, rest = 0, np.empty(0, bool)
        for mask in masks:
            rest = np.concatenate([rest, mask.reshape(-1)])
            whole = len(rest) // 8 * 8
            packed = np.packbits(rest[:whole], bitorder="little")
            bits[at : at + len(packed)] = packed
            at, rest = at + len(packed), rest[whole:]
        if at * 8 + len(rest) != n_rows:
            raise ValueError(f"there are {n_rows} rows, and the masks are of {at * 8 + len(rest)}")
        bits[at : at + (len(rest) > 0)] = np.packbits(rest, bitorder="little")
        self.checksum = crc32c(bits.data)
        self._words = bits.view("<u8").astype(np.uint64, copy=False)
        in_words = np.bitwise_count(self._words).reshape(-1, _WORDS)
        up_to = np.cumsum(in_words, axis=1, dtype=np.uint16)
        self._in_block = (up_to - in_words).reshape(-1)
        """Valid rows before each word, counted from the start of its block."""
        self._counts = np.zeros(n_blocks + 1, np.int64)
        """Valid rows before each block."""
        np.cumsum(up_to[:, -1], out=self._counts[1:])
        self.n_valid = int(self._counts[-1])
        firsts = np.arange(0, max(self.n_valid, 1), _HINT)
        self._hints = np.searchsorted(self._counts, firsts, side="right") - 1
        tables = (self._words, self._in_block, self._counts, self._hints)
        self.nbytes = sum(table.nbytes for table in tables)

    def select(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Like `ValidRows.select`."""
        blocks = self._hints[ranks // _HINT]
        behind = np.flatnonzero(self._counts[blocks + 1] <= ranks)
        for _ in range(_STEPS):
            blocks[behind] += 1
            behind = behind[self._counts[blocks[behind] + 1] <= ranks[behind]]
        blocks[behind] = np.searchsorted(self._counts, ranks[behind], side="right") - 1
        left = ranks - self._counts[blocks]
        words = blocks * _WORDS
        for step in (4, 2, 1):
            words += step * (self._in_block[words + step] <= left)
        left -= self._in_block[words]
        return words * _BITS + _select_in_words(self._words[words], left.view(np.uint64))

    def rank(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Like `ValidRows.rank`."""
        words, bit = rows // _BITS, (rows % _BITS).astype(np.uint64)
        below = np.bitwise_count(self._words[words] & ((_ONE << bit) - _ONE))
        ranks: NDArray[np.int64] = self._counts[words // _WORDS] + self._in_block[words] + below
        return ranks


def _select_in_words(words: NDArray[np.uint64], left: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The place of the set bit that has ``left`` set bits below it: its byte first, then by table."""
    counts = words - ((words >> np.uint64(1)) & _PAIRS)
    counts = (counts & _FOURS) + ((counts >> np.uint64(2)) & _FOURS)
    counts = (counts + (counts >> np.uint64(4))) & _BYTES
    up_to = counts * _ONES  # of each byte and all below it
    # Count the bytes that end before the bit: subtracting their counts from what is left keeps the high bit set.
    n_before = np.bitwise_count(((left * _ONES) | _HIGHS) - up_to & _HIGHS)
    shifts = n_before.astype(np.uint64) << np.uint64(3)
    left = left - (((up_to << np.uint64(8)) >> shifts) & _LAST)
    places: NDArray[np.uint64] = shifts + _BIT_OF_BYTE[(words >> shifts) & _LAST, left]
    return places.view(np.int64)


def _bits_of_bytes() -> NDArray[np.uint64]:
    """The place of the i-th set bit of each byte, [256, 8]."""
    table = np.zeros((256, 8), np.uint64)
    for byte in range(256):
        places = [place for place in range(8) if byte >> place & 1]
        table[byte, : len(places)] = places
    return table


_BIT_OF_BYTE: Final = _bits_of_bytes()

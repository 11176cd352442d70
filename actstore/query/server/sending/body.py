"""Bodies of replies, made piece by piece while they are sent."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np

from actstore.loader.batches.lent_rows import LentRows
from actstore.query.server.connections.socket_writes import Vectors

_COPIED_NBYTES: Final = 2 << 20
_OF_ROW_NBYTES: Final = 64
"""Bytes of memory for each row of a batch that is sent from where it lies: its number, and its address and length while
it is sent.
"""


class Scattered:
    """Bytes of rows that lie in mapped files, and are sent from there."""

    def __init__(self, rows: LentRows, start: int, stop: int) -> None:
        """
        Args:
            rows: rows whose bytes follow each other.
            start: first byte to send.
            stop: byte after the last one; at least one byte is sent.
        """
        first = start // rows.row_nbytes
        self._rows = rows[first : -(-stop // rows.row_nbytes)]
        self._start = start - first * rows.row_nbytes
        self.nbytes = stop - start

    def vectors(self) -> Vectors:
        """Addresses and lengths of the bytes, without those of the last row."""
        self._rows.fetch()
        addresses = self._rows[:-1].addresses()
        table = np.column_stack([addresses, np.full_like(addresses, self._rows.row_nbytes)])
        if len(table):
            table[0] += np.array([self._start, -self._start]).astype(np.uint64)
        return table

    def end(self) -> bytes:
        """Bytes of the last row. If they are read after the others were sent, a reply that is whole has exactly the
        stored bytes.

        Raises:
            StorageError: a file of any of the rows was truncated.
        """
        last = self._rows[-1:].copied().tobytes()
        self._rows.check()
        before = (len(self._rows) - 1) * self._rows.row_nbytes
        return last[max(0, self._start - before) : self._start + self.nbytes - before]

    def copies(self) -> Iterator[memoryview]:
        """Copies of the bytes, for a reply that cannot be sent from where they lie.

        Raises:
            StorageError: a file was truncated.
        """
        nbytes, stop = self._rows.row_nbytes, self._start + self.nbytes
        step = max(1, _COPIED_NBYTES // nbytes)
        for row in range(0, len(self._rows), step):
            data = self._rows[row : row + step].copied().reshape(-1).data
            yield data[max(0, self._start - row * nbytes) : min(data.nbytes, stop - row * nbytes)]


Piece = memoryview | Scattered


class Part(Protocol):
    """Bytes of a body, of known length."""

    @property
    def nbytes(self) -> int: ...

    @property
    def kept_nbytes(self) -> int:
        """Bytes of memory that the part takes during the whole reply, and that nothing else counts."""
        ...

    @property
    def held_nbytes(self) -> int:
        """Bytes of memory that the part takes in addition while it is read and sent, and that nothing else counts."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether the pieces need no reading or making."""
        ...

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the bytes ``start:stop``, in order; each piece is read when it is asked for. Large pieces are memory
        that is held anyway, or mapped files.

        Raises:
            NotCommittedError: a row is not committed.
            StorageError: a row cannot be read.
        """
        ...


class InMemory:
    """Bytes that are in memory already."""

    def __init__(self, data: Any, *, is_counted: bool = False) -> None:
        """
        Args:
            data: object with a buffer.
            is_counted: whether its memory is counted elsewhere.
        """
        self.array = np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)
        """The bytes as an array that is freed when none of it is being sent any more; `bytes` have no weak references.
        """
        self.is_ready = True
        self._data = memoryview(self.array.data)
        self.nbytes = self._data.nbytes
        self.kept_nbytes = 0 if is_counted else self.nbytes
        self.held_nbytes = 0

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """Implements `Part.pieces`."""
        yield self._data[start:stop]


class ReadByRow(Protocol):
    """Bytes of an array that are read some rows at a time."""

    @property
    def nbytes(self) -> int: ...
    @property
    def row_nbytes(self) -> int: ...
    @property
    def held_nbytes(self) -> int: ...
    def read(self, start: int, stop: int) -> tuple[memoryview, int]: ...


class Stored:
    """Stored bytes of a part of an array."""

    kept_nbytes = 0

    def __init__(self, cut: ReadByRow) -> None:
        self._cut = cut
        self.nbytes = cut.nbytes
        self.held_nbytes = cut.held_nbytes
        self.is_ready = not cut.held_nbytes  # it is mapped

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """Implements `Part.pieces`."""
        if stop <= start:
            return
        nbytes = self._cut.row_nbytes
        row, end = start // nbytes, -(-stop // nbytes)
        while row < end:
            piece, n_rows = self._cut.read(row, end)
            yield piece[max(0, start - row * nbytes) : min(piece.nbytes, stop - row * nbytes)]
            row += n_rows


class InPlace:
    """Rows that stay in mapped files until they are sent."""

    def __init__(self, rows: LentRows) -> None:
        self._rows = rows
        self.nbytes = rows.nbytes
        self.is_ready = True
        # Two copies of the last row, or of as many as are sent together where they must be copied.
        copied = max(_COPIED_NBYTES, rows.row_nbytes)
        self.kept_nbytes = len(rows) * _OF_ROW_NBYTES
        self.held_nbytes = 2 * min(self.nbytes, copied)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Implements `Part.pieces`."""
        if stop > start:
            yield Scattered(self._rows, start, stop)


class Body:
    """Parts that follow each other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(part.nbytes for part in parts))
        self.nbytes = self._ends[-1] if parts else 0
        self.is_ready = all(part.is_ready for part in parts)
        # Parts are read one after the other.
        self.held_nbytes = sum(part.kept_nbytes for part in parts) + max(
            (part.held_nbytes for part in parts), default=0
        )

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Implements `Part.pieces`."""
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - part.nbytes
            if first < stop and start < end:
                yield from part.pieces(max(0, start - first), min(part.nbytes, stop - first))

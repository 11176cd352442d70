"""The bytes of a reply, made piece by piece while they are sent."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from actstore.query.cut import PIECE_NBYTES, Cut


class Part(Protocol):
    """Bytes of known length."""

    @property
    def nbytes(self) -> int: ...

    @property
    def held_nbytes(self) -> int:
        """Memory that it takes until it is sent, where that is more than a piece of the usual size."""
        ...

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes ``start:stop``, in order; read when they are asked for. Large pieces are memory that is there anyway,
        or files that are mapped.

        Raises:
            NotCommittedError: a row is not committed.
            StorageError: it cannot be read.
        """
        ...


class InMemory:
    """Bytes that are there."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self.nbytes = self.held_nbytes = self._data.nbytes

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """As `Part.pieces`."""
        yield self._data[start:stop]


class Stored:
    """A part of an array."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self.nbytes = cut.nbytes
        # One is sent while the next one is read.
        self.held_nbytes = 2 * cut.row_nbytes if cut.row_nbytes > PIECE_NBYTES else 0

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """As `Part.pieces`."""
        if stop <= start:
            return
        nbytes = self._cut.row_nbytes
        row, end = start // nbytes, -(-stop // nbytes)
        while row < end:
            piece, n_rows = self._cut.read(row, end)
            yield piece[max(0, start - row * nbytes) : min(piece.nbytes, stop - row * nbytes)]
            row += n_rows


class Body:
    """Parts, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(part.nbytes for part in parts))
        self.nbytes = self._ends[-1] if parts else 0
        self.held_nbytes = sum(part.held_nbytes for part in parts)

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """As `Part.pieces`."""
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - part.nbytes
            if first < stop and start < end:
                yield from part.pieces(max(0, start - first), min(part.nbytes, stop - first))

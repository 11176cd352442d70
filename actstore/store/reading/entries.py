"""What the entries of arrays of activations are: every position, or slots that hold chosen positions."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.store.reading.counts import Counts
from actstore.store.reading.rows import Rows

_BLOCK: Final = 1 << 22
"""Numbers that are read together."""
_NAMED: Final = 8
"""Stored positions that a message names."""


class PaddingWarning(UserWarning):
    """The last entry of every sequence was asked for, and that of some sequences is padding."""


class Entries:
    """The second axis of the activations of a store, which is said in positions where its users are."""

    def __init__(self, context_length: int, lengths: Rows, positions: Rows | None, *, is_full: bool) -> None:
        """
        Args:
            context_length: positions of a sequence.
            lengths: real tokens of each sequence.
            positions: position of each slot; None if all positions are stored.
            is_full: whether all entries of all sequences are in use.
        """
        self._context_length = context_length
        self._lengths = lengths
        self._positions = positions
        self.is_full = is_full
        """Whether all entries of all sequences are in use: there is no padding."""
        self.counts = Counts(lengths, positions)
        """How many entries of each sequence are in use; they come first."""
        self.width = context_length if positions is None else positions.shape[1]
        """Entries of a sequence."""

    @property
    def are_slots(self) -> bool:
        """Whether only chosen positions are stored."""
        return self._positions is not None

    def positions(self, sequences: slice | NDArray[np.int64]) -> NDArray[np.int32]:
        """The position of each entry of some sequences, [n, width]; -1 for slots that are not in use. Where all
        positions are stored, those of padding are given, too.

        Args:
            sequences: sequences, forwards.
        """
        if self._positions is not None:
            return self._positions[sequences]
        n = len(np.arange(len(self._lengths))[sequences])
        return np.broadcast_to(np.arange(self.width, dtype=np.int32), (n, self.width))

    def positions_at(self, sequences: NDArray[np.int64], entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of single entries, [n]."""
        if self._positions is None:
            return entries
        return self._positions.gather(sequences, entries).astype(np.int64)

    def in_use(self, sequences: slice | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether entries are in use, [n, width]."""
        is_used: NDArray[np.bool_] = np.arange(self.width) < self.counts[sequences][:, None]
        return is_used

    def of_tokens(self, array: Rows, sequences: slice | NDArray[np.int64]) -> NDArray[Any]:
        """What an array of tokens says of each entry of some sequences, [n, width]; -1 for slots that are not in use.

        Args:
            array: array [n_sequences, context_length] of the store, such as ``store.tokens``.
            sequences: sequences, forwards.
        """
        values = array[sequences]
        if self._positions is None:
            return values
        positions = self._positions[sequences]
        chosen = np.take_along_axis(values, np.maximum(positions, 0), axis=1)
        return np.where(positions < 0, np.array(-1, values.dtype), chosen)

    def last(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last entry of each sequence that is in use, [n].

        Raises:
            IndexError: nothing is stored of a sequence.
        """
        entries = np.empty(len(sequences), np.int64)
        for start in range(0, len(sequences), self._step):
            some = sequences[start : start + self._step]
            entries[start : start + self._step] = self.counts[some].astype(np.int64) - 1
        if len(entries) and entries.min() < 0:
            raise IndexError(
                f"no position of sequence {sequences[entries.argmin()]} is stored; leave sequences out whose "
                "store.counts are 0: acts.last(numpy.flatnonzero(store.counts[:]))"
            )
        return entries

    def find(self, sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The entries that hold positions, [n]; -1 where one is not stored, or is padding.

        Args:
            sequences: sequence of each position, [n].
            positions: positions, [n]; negative ones count from the last real token of the sequence back.
        """
        entries = np.full(len(sequences), -1, np.int64)
        for start in range(0, len(sequences), self._step):
            span = slice(start, start + self._step)
            entries[span] = self._find(sequences[span], positions[span])
        return entries

    def _find(self, sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if not len(sequences):
            return positions
        unique, inverse = np.unique(sequences, return_inverse=True)
        lengths = self._lengths[unique].astype(np.int64)[inverse]
        wanted = np.where(positions < 0, positions + lengths, positions)
        is_real = (wanted >= 0) & (wanted < lengths)
        if self._positions is None:
            return np.where(is_real, wanted, -1)
        is_there = self._positions[unique][inverse] == wanted[:, None]
        return np.where(is_real & is_there.any(axis=1), is_there.argmax(axis=1), -1)

    @property
    def _step(self) -> int:
        return max(1, _BLOCK // self.width)

    def missing(self, sequence: int, position: int) -> IndexError:
        """The error for a position that `find` does not find."""
        n = int(self._lengths[sequence])
        what = f"position {position} of sequence {sequence} is not stored"
        if not -n <= position < n:
            return IndexError(
                f"{what}: the sequence has {n} tokens, positions 0 to {n - 1}, or {-n} to -1 from its end"
            )
        there = self.positions(np.array([sequence]))[0]
        named: Sequence[int] = there[there >= 0].tolist()
        shown = ", ".join(map(str, named[:_NAMED])) + (", ..." if len(named) > _NAMED else "")
        return IndexError(
            f"{what}: the store has its positions {shown or 'none'}; extract it with other positions (--positions)"
        )

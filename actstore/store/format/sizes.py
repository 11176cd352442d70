"""How much of each sequence there is."""

from dataclasses import dataclass
from typing import Any, Self

from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Sizes:
    """How much of each of some sequences there is."""

    lengths: NDArray[Any]
    """Real tokens of each sequence, [n]."""
    counts: NDArray[Any]
    """Entries of each sequence that are in use in arrays of activations, [n]: its slots in use, or its real tokens.
    They come first.
    """

    @classmethod
    def of(cls, lengths: NDArray[Any], positions: NDArray[Any] | None) -> Self:
        """
        Args:
            lengths: real tokens, [n].
            positions: chosen positions, [n, slots], -1 for slots that are not in use; None if all are stored.
        """
        return cls(lengths, lengths if positions is None else (positions >= 0).sum(axis=1))

    def __getitem__(self, rows: slice) -> "Sizes":
        return Sizes(self.lengths[rows], self.counts[rows])

"""How many entries of each sequence are in use."""

from typing import Any

from numpy.typing import NDArray

from actstore.store.reading.rows import Rows


class Counts:
    """``counts[sequences]`` reads how many entries of activations each sequence has in use. They come first."""

    def __init__(self, lengths: Rows, positions: Rows | None) -> None:
        """
        Args:
            lengths: real tokens of each sequence.
            positions: chosen positions; None if all are stored.
        """
        self._lengths = lengths
        self._positions = positions

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """The counts of sequences that an index selects, as it would those of `lengths`."""
        if self._positions is None:
            return self._lengths[key]
        counts: NDArray[Any] = (self._positions[key] >= 0).sum(axis=-1)
        return counts

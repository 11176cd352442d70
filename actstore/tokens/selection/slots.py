"""Spooling chosen positions, whose number per sequence is known only once all sequences have been packed."""

from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

_BLOCK: Final = 1 << 20
"""Positions that are brought into their final form at once."""


class SlotSpool:
    """Chosen positions of all sequences, in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chosen: BinaryIO = (folder / "chosen.i32").open("wb")
        self._counts: BinaryIO = (folder / "counts.i32").open("wb")
        self._n_sequences = 0
        self.n_rows = 0
        """Number of chosen positions."""
        self.n_slots = 0
        """The most chosen positions of a sequence."""

    def add(self, positions: NDArray[np.int32]) -> None:
        """Add the positions of some sequences, [n, slots], -1 for slots that are not in use."""
        is_used = positions >= 0
        counts = is_used.sum(axis=1).astype("<i4")
        self._chosen.write(positions[is_used].astype("<i4").data)
        self._counts.write(counts.data)
        self._n_sequences += len(positions)
        self.n_rows += int(counts.sum(dtype=np.int64))
        self.n_slots = max(self.n_slots, int(counts.max(initial=0)))

    def finish(self, n_slots: int) -> NDArray[np.int32]:
        """All positions, [n_sequences, slots], as a map of a file.

        Args:
            n_slots: number of slots, if it is larger than `n_slots`.
        """
        self.close()
        n_slots = max(n_slots, self.n_slots)
        counts = np.memmap(self._folder / "counts.i32", "<i4", "r")
        step = max(1, _BLOCK // n_slots)
        with (
            (self._folder / "chosen.i32").open("rb") as chosen,
            (self._folder / "positions.i32").open("wb") as file,
        ):
            for start in range(0, self._n_sequences, step):
                some = counts[start : start + step]
                positions = np.full((len(some), n_slots), -1, "<i4")
                n_chosen = int(some.sum(dtype=np.int64))
                positions[np.arange(n_slots) < some[:, None]] = np.frombuffer(
                    chosen.read(4 * n_chosen), "<i4"
                )
                file.write(positions.data)
        shape = (self._n_sequences, n_slots)
        return np.memmap(self._folder / "positions.i32", np.dtype("<i4"), "r", shape=shape)

    def close(self) -> None:
        """Close the files."""
        self._chosen.close()
        self._counts.close()

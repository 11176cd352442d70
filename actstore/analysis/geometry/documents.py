"""Which documents are held out: the same ones in every store over the same tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.scanning.block import Block


@dataclass(frozen=True)
class DocumentShare:
    """The rows of held-out documents, or those of all others. Tokens that packing put in are in neither."""

    share: float
    """Share of the documents that is held out."""
    seed: int
    is_held_out: bool

    def __call__(self, block: Block) -> NDArray[np.bool_]:
        """Whether each row of a block belongs to them, [n_rows]."""
        is_held_out: NDArray[np.bool_] = draws(block.documents, self.seed) < self.share
        chosen = is_held_out if self.is_held_out else ~is_held_out
        return chosen & (block.documents >= 0)

    def identity(self) -> str:
        """A text that differs for other rows."""
        return f"documents {self.share} {self.seed} {self.is_held_out}"


def draws(documents: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A number from 0 to 1 for each document, which depends on its number and the seed alone: SplitMix64."""
    with np.errstate(over="ignore"):
        z = documents.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    numbers: NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers

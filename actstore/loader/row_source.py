"""Where the values of single rows come from."""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.loader.order import Window


class RowSource(Protocol):
    """One hook, as rows of the values at one position of one sequence."""

    def gather(self, rows: NDArray[np.int64], out: torch.Tensor) -> None:
        """Copy rows to where they are wanted.

        Args:
            rows: their numbers, sequence times context length plus position.
            out: uint8 [len(rows), nbytes of a row], contiguous.

        Raises:
            StorageError: they cannot be read, or are damaged.
        """

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """Told before `gather` which windows the rows are in, and which one comes after those."""

    def close(self) -> None:
        """Give memory and threads back."""


_WIDEST: Final = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def select(memory: torch.Tensor, rows: NDArray[np.int64], out: torch.Tensor) -> None:
    """``out[i] = memory[rows[i]]`` for uint8 [n_rows, nbytes], in the widest integers that a row is made of."""
    dtype = _WIDEST[math.gcd(memory.shape[1], 8)]
    torch.index_select(memory.view(dtype), 0, torch.from_numpy(rows), out=out.view(dtype))

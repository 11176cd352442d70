"""Where the values of single rows come from."""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.loader.ordering.order import Window


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


CONVERTED_NBYTES: Final = 1 << 20
"""Rows that are converted together, so that they are still in the cache."""
_CONVERTED_BY_MANY_NBYTES: Final = 16 << 20
"""The same for several threads of torch: to have them begin together takes longer than to fetch from a larger cache."""
_WIDEST: Final = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def select(memory: torch.Tensor, rows: NDArray[np.int64], out: torch.Tensor) -> None:
    """``out[i] = memory[rows[i]]`` for uint8 [n_rows, nbytes], in the widest integers that a row is made of."""
    dtype = _WIDEST[math.gcd(memory.shape[1], 8)]
    torch.index_select(memory.view(dtype), 0, torch.from_numpy(rows), out=out.view(dtype))


def select_converted(
    memory: torch.Tensor, rows: NDArray[np.int64], stored: torch.dtype, out: torch.Tensor
) -> None:
    """The same into another type, [len(rows), n]; a block of rows at a time, which is still in a cache when it is
    converted.
    """
    nbytes = CONVERTED_NBYTES if torch.get_num_threads() == 1 else _CONVERTED_BY_MANY_NBYTES
    step = max(1, nbytes // max(1, memory.shape[1]))
    block = torch.empty(min(step, len(rows)), memory.shape[1], dtype=torch.uint8)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        select(memory, part, block[: len(part)])
        out[start : start + step].copy_(block[: len(part)].view(stored))

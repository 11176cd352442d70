"""The interface of sources of single rows."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.loader.ordering.order import Window

if TYPE_CHECKING:
    import torch


class RowSource(Protocol):
    """The rows of one hook; a row is the values at one position of one sequence."""

    def gather(self, rows: NDArray[np.int64], out: "torch.Tensor") -> None:
        """Copy rows into a tensor.

        Args:
            rows: their numbers, sequence times context length plus position.
            out: uint8 [len(rows), bytes of a row], contiguous.

        Raises:
            StorageError: the rows cannot be read, or are damaged.
        """

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """Called before `gather` with the windows that the rows are in, and the window after those."""

    def close(self) -> None:
        """Release memory and threads."""


CONVERTED_NBYTES: Final = 1 << 20
"""Bytes of rows that are converted together, so that they are still in the cache."""
_CONVERTED_BY_MANY_NBYTES: Final = 16 << 20
"""`CONVERTED_NBYTES` for several torch threads: starting them takes longer than fetching from a larger cache."""
_WIDEST: Final = {8: "int64", 4: "int32", 2: "int16", 1: "uint8"}
"""Name of the integer type by its size in bytes."""


def select(memory: "torch.Tensor", rows: NDArray[np.int64], out: "torch.Tensor") -> None:
    """Set ``out[i] = memory[rows[i]]`` for uint8 [n_rows, nbytes], in the widest integers that divide a row."""
    import torch

    dtype: torch.dtype = getattr(torch, _WIDEST[math.gcd(memory.shape[1], 8)])
    torch.index_select(memory.view(dtype), 0, torch.from_numpy(rows), out=out.view(dtype))


def select_converted(
    memory: "torch.Tensor", rows: NDArray[np.int64], stored: "torch.dtype", out: "torch.Tensor"
) -> None:
    """Like `select`, but convert to the type of ``out``, [len(rows), n], in blocks that stay in a cache until they are
    converted.
    """
    import torch

    nbytes = CONVERTED_NBYTES if torch.get_num_threads() == 1 else _CONVERTED_BY_MANY_NBYTES
    step = max(1, nbytes // max(1, memory.shape[1]))
    block = torch.empty(min(step, len(rows)), memory.shape[1], dtype=torch.uint8)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        select(memory, part, block[: len(part)])
        out[start : start + step].copy_(block[: len(part)].view(stored))

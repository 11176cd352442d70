"""The interface of sources of single rows."""

import math
import threading
from collections.abc import Sequence
from functools import partial
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
"""`CONVERTED_NBYTES` where each operation is divided among threads of torch: waking them takes longer than fetching
from a larger cache.
"""
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

    from actstore.loader.rows.own_threads import n_threads, run_all

    is_alone = n_threads() > 1 or torch.get_num_threads() == 1
    nbytes = CONVERTED_NBYTES if is_alone else _CONVERTED_BY_MANY_NBYTES
    step = max(1, nbytes // max(1, memory.shape[1]))

    def convert(start: int) -> None:
        part = rows[start : start + step]
        block = _block(len(part) * memory.shape[1]).view(len(part), memory.shape[1])
        select(memory, part, block)
        out[start : start + step].copy_(block.view(stored))

    run_all([partial(convert, start) for start in range(0, len(rows), step)])


class _Kept(threading.local):
    """Memory that each thread keeps, since new memory costs a page fault for every 4 KiB."""

    block: "torch.Tensor | None" = None


_kept: Final = _Kept()


def _block(nbytes: int) -> "torch.Tensor":
    """Uninitialised memory, uint8 [nbytes], which is valid until this thread calls again."""
    import torch

    if nbytes > CONVERTED_NBYTES:
        return torch.empty(nbytes, dtype=torch.uint8)
    if _kept.block is None:
        _kept.block = torch.empty(CONVERTED_NBYTES, dtype=torch.uint8)
    return _kept.block[:nbytes]

"""Memory for batches that is used again once nobody looks at it."""

import math
import sys
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray


class Buffers:
    """Gives tensors. What a caller, a view or autograd still holds is left alone, so a batch never changes.

    New memory costs a page fault for every 4 KiB, which takes longer than to fill it.
    """

    def __init__(self) -> None:
        self._memories: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape, with anything in it."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory = self._unused(nbytes)
        if memory is None:
            # Those of another size, such as of the last batch of an epoch, are not kept for ever.
            self._memories = [one for one in self._memories if one.nbytes == nbytes]
            memory = np.empty(nbytes, np.uint8)
            self._memories.append(memory)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def _unused(self, nbytes: int) -> NDArray[np.uint8] | None:
        for memory, n_holders in zip(self._memories, _holders(self._memories), strict=True):
            if memory.nbytes == nbytes and n_holders == _ALONE:
                return memory
        return None


def _holders(memories: list[NDArray[np.uint8]]) -> list[int]:
    """References to each. A tensor, and so each view of it, holds the array that its memory is from."""
    return [sys.getrefcount(memory) for memory in memories]


_ALONE: Final = _holders([np.empty(1, np.uint8)])[0]
"""Of an array that only a list holds; which temporary ones there are differs by release of Python."""

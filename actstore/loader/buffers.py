"""Memory for batches that is used again once nobody looks at it."""

import math
import sys

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
        for memory in self._memories:
            # The list, the loop and the call itself; a tensor holds the array that its memory is from.
            if memory.nbytes == nbytes and sys.getrefcount(memory) == 3:
                return memory
        return None

"""Memory for batches that is reused once nobody holds it."""

import contextlib
import math
import mmap
import sys
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


_ALIGNMENT: Final = 64
"""Alignment in bytes: that of a cache line and of the widest registers."""
_MAPPED_NBYTES: Final = 1 << 20
"""Size in bytes from which memory is mapped by itself, so that the system gets it back as soon as nobody holds it. What
`malloc` gave may stay with the process when it is freed.
"""


class Buffers:
    """Gives out tensors. Memory that a caller, a view or autograd still holds is not reused, so a batch never changes.

    New memory costs a page fault for every 4 KiB, which takes longer than filling it.
    """

    def __init__(self, n_kept: int, *, is_pinned: bool = False) -> None:
        """
        Args:
            n_kept: how many memories are kept for reuse, of all sizes together.
            is_pinned: whether a GPU reads the memory.
        """
        self._n_kept = n_kept
        self._is_pinned = is_pinned
        self._memories: dict[int, list[NDArray[np.uint8]]] = {}
        """Kept memories by size: a smaller last batch needs another size."""

    @property
    def _n_memories(self) -> int:
        return sum(map(len, self._memories.values()))

    def take(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
        """A tensor of this shape, not initialised."""
        import torch

        nbytes = math.prod(shape) * dtype.itemsize
        memories = self._memories.setdefault(nbytes, [])
        memory = next((one for one, n in zip(memories, _holders(memories), strict=True) if n == _ALONE), None)
        if memory is None:
            has_room = self._n_memories < self._n_kept or self._forget_other(nbytes)
            memory = self._new(nbytes)
            if has_room:  # more are needed only if the caller collects batches
                memories.append(memory)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def _forget_other(self, nbytes: int) -> bool:
        """Drop one unused memory of another size; False if there is none."""
        for size, memories in self._memories.items():
            for number, n in enumerate(_holders(memories)) if size != nbytes else ():
                if n == _ALONE:
                    del memories[number]
                    return True
        return False

    def _new(self, nbytes: int) -> NDArray[np.uint8]:
        if not self._is_pinned:
            return new_memory(nbytes)
        import torch

        pinned: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned


def new_memory(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised memory, aligned for fast writes. The system gets large memory back as soon as it is freed."""
    if nbytes < _MAPPED_NBYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        # NumPy's own memory begins 16 bytes behind a page, where index_select writes at a third of the speed.
        memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + nbytes]
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system has no huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)  # as NumPy does with its own
    return np.frombuffer(mapped, np.uint8)


def _holders(memories: list[NDArray[np.uint8]]) -> list[int]:
    """Reference counts of memories. A tensor and all of its views hold the array of their memory."""
    return [sys.getrefcount(memory) for memory in memories]


_ALONE: Final = _holders([np.empty(1, np.uint8)])[0]
"""Reference count of an array that only a list holds; temporary references differ between Python releases."""

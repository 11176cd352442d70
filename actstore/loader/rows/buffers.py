"""Memory for batches that is used again once nobody looks at it."""

import contextlib
import math
import mmap
import sys
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT: Final = 64
"""Bytes: a line of the cache, and the widest registers."""
_MAPPED_NBYTES: Final = 1 << 20
"""From here on memory is mapped by itself, so that the system has it back as soon as nobody holds it. What `malloc`
gives may stay with the process when it is freed.
"""


class Buffers:
    """Gives tensors. What a caller, a view or autograd still holds is left alone, so a batch never changes.

    New memory costs a page fault for every 4 KiB, which takes longer than to fill it.
    """

    def __init__(self, n_kept: int, *, is_pinned: bool = False) -> None:
        """
        Args:
            n_kept: to be used again, of all sizes together.
            is_pinned: whether a GPU is to read it.
        """
        self._n_kept = n_kept
        self._is_pinned = is_pinned
        self._memories: dict[int, list[NDArray[np.uint8]]] = {}
        """By size: those of a smaller last batch have another one."""

    @property
    def _n_memories(self) -> int:
        return sum(map(len, self._memories.values()))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape, with anything in it."""
        nbytes = math.prod(shape) * dtype.itemsize
        memories = self._memories.setdefault(nbytes, [])
        memory = next((one for one, n in zip(memories, _holders(memories), strict=True) if n == _ALONE), None)
        if memory is None:
            has_room = self._n_memories < self._n_kept or self._forget_other(nbytes)
            memory = self._new(nbytes)
            if has_room:  # more than that are held by a caller who collects batches
                memories.append(memory)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def _forget_other(self, nbytes: int) -> bool:
        """Let memory of another size go that nobody holds, if there is some."""
        for size, memories in self._memories.items():
            for number, n in enumerate(_holders(memories)) if size != nbytes else ():
                if n == _ALONE:
                    del memories[number]
                    return True
        return False

    def _new(self, nbytes: int) -> NDArray[np.uint8]:
        if not self._is_pinned:
            return new_memory(nbytes)
        pinned: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned


def new_memory(nbytes: int) -> NDArray[np.uint8]:
    """Memory with anything in it, that begins where it is written fast. If it is much, the system has it back at once
    when it is let go.
    """
    if nbytes < _MAPPED_NBYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        # NumPy's own memory begins 16 bytes behind a page, and index_select writes there at a third of the speed.
        memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + nbytes]
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            mapped.madvise(mmap.MADV_HUGEPAGE)  # as NumPy does with its own
    return np.frombuffer(mapped, np.uint8)


def _holders(memories: list[NDArray[np.uint8]]) -> list[int]:
    """References to each. A tensor, and so each view of it, holds the array that its memory is from."""
    return [sys.getrefcount(memory) for memory in memories]


_ALONE: Final = _holders([np.empty(1, np.uint8)])[0]
"""Of an array that only a list holds; which temporary ones there are differs by release of Python."""

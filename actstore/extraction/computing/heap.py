"""Keeping the C heap from returning memory between forwards."""

import ctypes
import sys
from typing import Final

# From <malloc.h> of glibc.
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8


def keep_large_blocks() -> None:
    """Let this process reuse the memory of large temporary tensors.

    glibc maps each block of some megabytes anew and unmaps it when freed, so that every layer of every forward on
    a CPU pays for fresh pages: up to half of the time of a small model. A heap that keeps them does not, at the
    cost of memory that stays with the process. Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value allowed
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    mallopt(_M_TOP_PAD, 64 << 20)
    # The forward has a thread of its own, and the arenas of threads are too small to keep anything.
    mallopt(_M_ARENA_MAX, 1)

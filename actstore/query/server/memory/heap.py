"""Has the C heap give back freed memory: the opposite of `actstore.extraction.computing.heap`."""

import ctypes
import sys
from typing import Any, Final

_M_MMAP_THRESHOLD: Final = -3
"""Value of the constant in <malloc.h> of glibc."""
_LARGE_NBYTES: Final = 4 << 20
"""Bytes that make a block large: larger than the pieces of replies, which would otherwise be mapped anew each time."""


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def give_back_large_blocks() -> None:
    """Give blocks of some megabytes back to the system when they are freed. glibc otherwise keeps ever larger ones,
    up to 32 MiB each. It does nothing without glibc.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_NBYTES)


def trim() -> None:
    """Give the unused memory of the heap back to the system, which can take milliseconds."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)

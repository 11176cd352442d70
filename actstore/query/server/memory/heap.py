"""Having the C heap give back what is freed: the opposite of `actstore.extraction.computing.heap`."""

import ctypes
import sys
from typing import Any, Final

_M_MMAP_THRESHOLD: Final = -3
"""From <malloc.h> of glibc."""
_LARGE_NBYTES: Final = 4 << 20
"""Larger than the pieces of replies, for which new memory would be asked for again and again."""


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def give_back_large_blocks() -> None:
    """Have blocks of some megabytes leave the process when they are freed. glibc keeps ever larger ones otherwise,
    up to 32 MiB each. Does nothing where there is no glibc.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_NBYTES)


def trim() -> None:
    """Give back what the heap holds and nobody uses, which can take milliseconds."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)

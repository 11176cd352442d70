"""Loads torch when the first batch is asked for: a server that sends slices alone starts sooner, and holds less memory,
without it.
"""

import gc
import threading
from typing import Final

_LOADED: Final = threading.Event()


def load_torch() -> None:
    """Load torch, which takes about a second. Not for the thread of the event loop."""
    if not _LOADED.is_set():
        import torch  # noqa: F401

        gc.freeze()  # torch stays to the end: the collector need not go through all of it again and again
        _LOADED.set()


def is_torch_loaded() -> bool:
    """Whether `load_torch` has ended."""
    return _LOADED.is_set()


def use_one_torch_thread() -> None:
    """Make torch compute in the calling thread alone."""
    import torch

    torch.set_num_threads(1)

"""One forward of a model at a time: what hangs on its modules belongs to one forward."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from actstore.errors import HookError

if TYPE_CHECKING:
    from torch import nn

_guard = threading.Lock()
_locks: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_running: set[int] = set()
"""Ids of the modules whose lock is held."""


@contextmanager
def exclusive(base: "nn.Module") -> Iterator[None]:
    """Other threads wait here until the forward that runs on this model, through any wrapper, has ended.

    Raises:
        HookError: it was started from inside of a forward of the same model.
    """
    with _guard:
        lock = _locks.setdefault(base, threading.RLock())
    with lock:
        if id(base) in _running:
            raise HookError(
                "a function on a hook runs the model that it hangs on; run the model before, and let the function use "
                "what came out"
            )
        _running.add(id(base))
        try:
            yield
        finally:
            _running.discard(id(base))

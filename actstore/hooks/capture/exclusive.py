"""One forward of a model at a time: PyTorch hooks on its modules belong to one forward of one thread."""

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


class Turn:
    """A forward that is running."""

    def __init__(self, base: "nn.Module") -> None:
        self.base = base
        self.in_function = False
        """Whether a function on a hook is running, so that modules that it calls are not part of the forward."""
        self._thread = threading.get_ident()

    def is_passing(self) -> bool:
        """Whether a module that runs now is part of this forward: no function on a hook or other thread calls it."""
        return not self.in_function and threading.get_ident() == self._thread


class _Turns(threading.local):
    def __init__(self) -> None:
        self.stack: list[Turn] = []


_turns = _Turns()
"""The forwards of this thread, the innermost last: a function of one model may run another model."""

_RECURSION = (
    "a function on a hook runs its own model; run the model before, and let the function use what came out"
)


@contextmanager
def exclusive(base: "nn.Module") -> Iterator[Turn]:
    """Run one forward in this context; other threads wait until it has ended, whichever wrapper of the model they use.

    Raises:
        HookError: a forward of the same model is running in this thread.
    """
    with _guard:
        lock = _locks.setdefault(base, threading.RLock())
    with lock:
        if id(base) in _running:
            raise HookError(_RECURSION)
        _running.add(id(base))
        turn = Turn(base)
        _turns.stack.append(turn)
        try:
            yield turn
        finally:
            _turns.stack.pop()
            _running.discard(id(base))


@contextmanager
def in_function() -> Iterator[None]:
    """Mark the innermost forward of this thread as being in a function on a hook."""
    turn = _turns.stack[-1]
    turn.in_function = True
    try:
        yield
    finally:
        turn.in_function = False


def check_not_in_function(base: "nn.Module") -> bool:
    """Whether a forward of this model that we started is running in this thread.

    Raises:
        HookError: this is called from a function on one of its hooks.
    """
    turn = next((turn for turn in reversed(_turns.stack) if turn.base is base), None)
    if turn is not None and turn.in_function:
        raise HookError(_RECURSION)
    return turn is not None

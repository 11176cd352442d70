"""One forward of a model at a time: what hangs on its modules belongs to one forward, and to one thread."""

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
    """A forward while it runs."""

    def __init__(self, base: "nn.Module") -> None:
        self.base = base
        self.in_function = False
        """Whether a function on a hook is being called, so that modules that run now are not part of the forward."""
        self._thread = threading.get_ident()

    def is_passing(self) -> bool:
        """Whether what passes a module now is this forward: no call from within a function, nor of another thread."""
        return not self.in_function and threading.get_ident() == self._thread


class _Turns(threading.local):
    def __init__(self) -> None:
        self.stack: list[Turn] = []


_turns = _Turns()
"""The forwards of this thread, the innermost last: a function of one model may run another model."""

_RECURSION = (
    "a function on a hook runs the model that it hangs on; run the model before, and let the function use what came "
    "out"
)


@contextmanager
def exclusive(base: "nn.Module") -> Iterator[Turn]:
    """Other threads wait here until the forward that runs on this model, through any wrapper, has ended.

    Raises:
        HookError: it was started from inside of a forward of the same model.
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
    """While a function on a hook is called, in the innermost forward of this thread."""
    turn = _turns.stack[-1]
    turn.in_function = True
    try:
        yield
    finally:
        turn.in_function = False


def check_not_in_function(base: "nn.Module") -> bool:
    """Whether a forward of this model, ours, runs in this thread.

    Raises:
        HookError: it does, and this is called from a function on one of its hooks.
    """
    turn = next((turn for turn in reversed(_turns.stack) if turn.base is base), None)
    if turn is not None and turn.in_function:
        raise HookError(_RECURSION)
    return turn is not None

"""Making items ahead in a thread of their own."""

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Never, TypeVar

from actstore.errors import LoaderError

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over what another one gives, a few items ahead. Its errors are raised where their item would be."""

    def __init__(self, items: Iterator[T], depth: int, interrupt: Callable[[], None]) -> None:
        """
        Args:
            items: used by one thread only; its ``close`` is called there, if it has one.
            depth: how many items wait at most, 1 or more.
            interrupt: called when the thread is to end, so that the item that it is at may end with an error. It must
                not wait for anything.
        """
        # The thread does not hold this object, so that it can go, and the thread with it.
        self._shared = shared = _Shared[T](depth)
        self._end = _Ending(shared, interrupt)
        self._thread = self._end.thread = threading.Thread(
            target=_work, args=(items, shared, self._end), name="prefetch", daemon=True
        )
        # Nothing is waited for there: whatever thread collects garbage may be one that the items need.
        weakref.finalize(self, self._end).atexit = False
        _RUNNING.add(self._end)
        _STARTED.difference_update([thread for thread in tuple(_STARTED) if not thread.is_alive()])
        self._thread.start()
        _STARTED.add(self._thread)

    @property
    def n_ready(self) -> int:
        """Items that wait."""
        return len(self._shared.items)

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        """The next item. What ends the items ends the thread, and comes again whenever it is asked for.

        Raises:
            LoaderError: it was closed.
        """
        return self._shared.take()()

    def close(self) -> None:
        """End the thread, after the item that it is at, or in the midst of it."""
        self._end()
        self._end.join()


_Item = Callable[[], T]
"""Gives the item, or raises what came instead."""


class _Shared(Generic[T]):
    """What both sides see."""

    def __init__(self, depth: int) -> None:
        # Its lock is reentrant: garbage may be collected while it is held, and end the thread.
        self._changed = threading.Condition()
        self._depth = depth
        self._last: _Item[T] | None = None
        self.items: deque[_Item[T]] = deque()
        self.is_closed = False

    def put(self, item: _Item[T]) -> None:
        """Wait until there is a place for it, or it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or len(self.items) < self._depth)
            self.items.append(item)
            self._changed.notify_all()

    def end_with(self, item: _Item[T]) -> None:
        """After those that wait, this comes without end."""
        with self._changed:
            self._last = item
            self._changed.notify_all()

    def take(self) -> _Item[T]:
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or self.items or self._last is not None)
            if self.is_closed:
                raise LoaderError("the loader was closed, or begins elsewhere; ask for the batch again")
            if self._last is not None and not self.items:
                return self._last
            item = self.items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()


class _Ending:
    """Tells a thread to end."""

    thread: threading.Thread

    def __init__(self, shared: _Shared[T], interrupt: Callable[[], None]) -> None:
        self._shared = shared
        self._interrupt = interrupt

    def __call__(self) -> None:
        # Not in a forked process, where locks may be held by threads that are not there.
        if self.thread.is_alive():
            self._shared.close()
            self._interrupt()

    def join(self) -> None:
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join()


_RUNNING: set[_Ending] = set()
"""Threads that are to be told to end when the interpreter goes."""
_STARTED: set[threading.Thread] = set()
"""Threads that are waited for then, also those that have nothing left to do but to give memory back. One that is in
torch's code when the interpreter is gone cannot leave it, and aborts the process ("terminate called without an active
exception").
"""


@atexit.register
def _end_all() -> None:
    for end in tuple(_RUNNING):
        end()
    for thread in tuple(_STARTED):
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join()


def _work(items: Iterator[T], shared: _Shared[T], end: _Ending) -> None:
    try:
        while not shared.is_closed:
            try:
                item = next(items)
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
                shared.end_with(_raiser(error))
                return
            shared.put(_giver(item))
            del item  # or it is held while the next one is made
    finally:
        if hasattr(items, "close"):
            items.close()
        _RUNNING.discard(end)


def _giver(item: T) -> _Item[T]:
    return lambda: item


def _raiser(error: BaseException) -> Callable[[], Never]:
    def give() -> Never:
        raise error

    return give

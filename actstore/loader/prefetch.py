"""Making items ahead in a background thread."""

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Never, TypeVar

from actstore.errors import LoaderError

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator that takes items of another one a few steps ahead. An error is raised in the place of its item."""

    def __init__(self, items: Iterator[T], depth: int, interrupt: Callable[[], None]) -> None:
        """
        Args:
            items: the iterator; only the background thread uses it, and closes it if it has a ``close``.
            depth: the most items that wait, 1 or more.
            interrupt: called when the thread should end, so that the item in the making can fail early. It must not
                wait for anything.
        """
        # The thread does not hold this object, so that dropping the object ends the thread.
        self._shared = shared = _Shared[T](depth)
        self._end = _Ending(shared, interrupt)
        self._thread = self._end.thread = threading.Thread(
            target=_work, args=(items, shared, self._end), name="prefetch", daemon=True
        )
        # The finaliser waits for nothing: it may run in a thread that the items need.
        weakref.finalize(self, self._end).atexit = False
        _RUNNING.add(self._end)
        _STARTED.difference_update([thread for thread in tuple(_STARTED) if not thread.is_alive()])
        self._thread.start()
        _STARTED.add(self._thread)

    @property
    def n_ready(self) -> int:
        """Number of items that wait."""
        return len(self._shared.items)

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        """The next item. The error or StopIteration that ended the items is raised by every later call, too.

        Raises:
            LoaderError: the prefetch was closed.
        """
        return self._shared.take()()

    def close(self) -> None:
        """End the thread, after or within the item that it is making."""
        self._end()
        self._end.join()


_Item = Callable[[], T]
"""Returns the item, or raises the error in its place."""


class _Shared(Generic[T]):
    """The queue between the thread and the caller."""

    def __init__(self, depth: int) -> None:
        # The lock is reentrant: a garbage collection while it is held can call `close`.
        self._changed = threading.Condition()
        self._depth = depth
        self._last: _Item[T] | None = None
        self.items: deque[_Item[T]] = deque()
        self.is_closed = False

    def put(self, item: _Item[T]) -> None:
        """Wait until the queue has room or is closed, then add the item."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or len(self.items) < self._depth)
            self.items.append(item)
            self._changed.notify_all()

    def end_with(self, item: _Item[T]) -> None:
        """Return this item for ever after those that wait."""
        with self._changed:
            self._last = item
            self._changed.notify_all()

    def take(self) -> _Item[T]:
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or self.items or self._last is not None)
            if self.is_closed:
                raise LoaderError("the loader was closed, or moved to another batch; request the batch again")
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
    """Makes a thread end."""

    thread: threading.Thread

    def __init__(self, shared: _Shared[T], interrupt: Callable[[], None]) -> None:
        self._shared = shared
        self._interrupt = interrupt

    def __call__(self) -> None:
        # Not in a forked process, where threads that do not exist may hold locks.
        if self.thread.is_alive():
            self._shared.close()
            self._interrupt()

    def join(self) -> None:
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join()


_RUNNING: set[_Ending] = set()
"""Threads that have to be ended when the interpreter exits."""
_STARTED: set[threading.Thread] = set()
"""Threads that are joined when the interpreter exits, also those that only free memory by then. A thread inside torch's
code when the interpreter is gone aborts the process ("terminate called without an active exception").
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
            del item  # or it stays in memory while the next one is made
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

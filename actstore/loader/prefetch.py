"""Making items ahead in a thread of their own."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over what another one gives, a few items ahead. Its errors are raised where their item would be."""

    def __init__(self, items: Iterator[T], depth: int, interrupt: Callable[[], None]) -> None:
        """
        Args:
            items: used by one thread only; its ``close`` is called there, if it has one.
            depth: how many items wait at most, 1 or more.
            interrupt: called when the thread is to end, so that the item that it is at may end with an error.
        """
        self._queue: queue.Queue[_Item[T]] = queue.Queue(depth)
        stop = threading.Event()
        # The thread does not hold this object, so that it can go, and the thread with it.
        self._thread = threading.Thread(
            target=_work, args=(items, self._queue, stop), name="prefetch", daemon=True
        )
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._queue, stop, interrupt)
        self._thread.start()

    @property
    def n_ready(self) -> int:
        """Items that wait."""
        return self._queue.qsize()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        if not self._finalizer.alive:
            raise StopIteration
        item = self._queue.get()
        try:
            return item()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the thread, after the item that it is at, or in the midst of it."""
        self._finalizer()


_Item = Callable[[], T]
"""Gives the item, or raises what came instead."""


def _work(items: Iterator[T], ready: "queue.Queue[_Item[T]]", stop: threading.Event) -> None:
    try:
        while not stop.is_set():
            ready.put(_next(items))
    finally:
        if hasattr(items, "close"):
            items.close()


def _next(items: Iterator[T]) -> _Item[T]:
    try:
        item = next(items)
    except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
        found = error
    else:
        return lambda: item

    def give() -> T:
        raise found

    return give


def _stop(
    thread: threading.Thread,
    ready: "queue.Queue[_Item[T]]",
    stop: threading.Event,
    interrupt: Callable[[], None],
) -> None:
    stop.set()
    if thread.is_alive():  # not in a forked process, where locks may be held by threads that are not there
        interrupt()
    while thread.is_alive() and thread is not threading.current_thread():
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(0.01)

"""Calls in another thread that are interrupted together with the thread that waits for them."""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")


class Interruptible(Generic[T]):
    """A call that other threads can interrupt while it goes on."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __call__(self) -> T:
        with self._lock:
            self._thread = threading.get_ident()
        try:
            return self._call()
        finally:
            with self._lock:
                self._thread = None

    def interrupt(self) -> None:
        """Raise a KeyboardInterrupt in the call, at its next step in Python; nothing happens if it does not go on."""
        with self._lock:
            if self._thread is not None:
                raised = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), raised)


def interruptible(threads: Executor, call: Callable[[], T]) -> T:
    """Run a call in a thread of ``threads`` and return its result, or raise its error.

    If an exception interrupts the wait, such as the KeyboardInterrupt of Ctrl-C, a KeyboardInterrupt is raised in the
    call as well, at its next step in Python. Otherwise the call would go on, and the interpreter would wait for it
    before it exits.
    """
    running = Interruptible(call)
    future = threads.submit(running)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        running.interrupt()
        raise

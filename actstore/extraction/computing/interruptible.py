"""Calls in another thread that are interrupted together with the thread that waits for them."""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


def interruptible(threads: Executor, call: Callable[[], T]) -> T:
    """Run a call in a thread of ``threads`` and return its result, or raise its error.

    If an exception interrupts the wait, such as the KeyboardInterrupt of Ctrl-C, a KeyboardInterrupt is raised in the
    call as well, at its next step in Python. Otherwise the call would go on, and the interpreter would wait for it
    before it exits.
    """
    lock = threading.Lock()
    thread: int | None = None

    def run() -> T:
        nonlocal thread
        with lock:
            thread = threading.get_ident()
        try:
            return call()
        finally:
            with lock:
                thread = None

    future = threads.submit(run)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        with lock:
            if thread is not None:
                raised = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
        raise

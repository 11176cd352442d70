"""A lock for calls from where nobody may wait for it."""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType


class DeferringLock:
    """A `threading.Lock` with which a call can be left: the thread that holds the lock makes it, or it is made at once
    if nobody does.

    Finalizers run in any thread at any moment, also in one that holds the lock, and the thread that sends replies must
    never wait: both leave a call here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._run()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        self._catch_up()

    def later(self, call: Callable[[], None]) -> None:
        """Have a function called while the lock is held: now, or before another thread takes it. It must not raise."""
        self._calls.append(call)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._calls and self._lock.acquire(blocking=False):
            try:
                self._run()
            finally:
                self._lock.release()

    def _run(self) -> None:
        while self._calls:
            self._calls.popleft()()

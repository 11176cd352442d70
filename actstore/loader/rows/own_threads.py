"""Threads of our own in which torch works alone.

torch divides each operation among a pool of threads that it keeps for the thread that calls it, and all of the pool
wait for each other at the end of each operation. With more threads than cores they sleep there and have to be woken,
which takes longer than an operation on a block that fits a cache. Here a whole job is divided once, and each thread
runs the operations of its parts alone.
"""

import concurrent.futures
import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import torch

_MOST: Final = 8
"""The most threads of a job: no more are needed to use all of the memory's speed, and each operation needs Python's
lock for a moment.
"""

Part = Callable[[], object]


def n_threads() -> int:
    """How many threads `run_all` uses: as many as torch has for the calling thread, up to 8. It is 1 if torch cannot be
    kept to one thread here; the operations of that one use torch's own then.
    """
    return min(torch.get_num_threads(), _MOST) if _limit() is not None else 1


def run_all(parts: Iterable[Part]) -> None:
    """Run all parts of a job, in the calling thread and others. When this returns or raises, none is running, and none
    is held any more.

    Raises:
        BaseException: what a part raised; those that had not begun by then were left out.
    """
    waiting = deque(parts)
    helpers: list[Future[None]] = []
    try:
        with contextlib.suppress(RuntimeError):  # the interpreter is exiting, or there can be no more threads
            n = n_threads() - 1
            for _ in range(min(n, len(waiting) - 1)):
                helpers.append(_helpers().submit(n, waiting))
        with _alone() if helpers else contextlib.nullcontext():
            _work(waiting)
    finally:
        waiting.clear()
        begun = [helper for helper in helpers if not helper.cancel()]
        _join(begun)
    for helper in begun:
        helper.result()


def _work(waiting: deque[Part]) -> None:
    while waiting:
        try:
            part = waiting.popleft()
        except IndexError:  # another thread took it since
            return
        try:
            part()
        except BaseException:
            waiting.clear()
            raise


def _join(futures: list[Future[None]]) -> None:
    """Wait for all, also if the caller is interrupted meanwhile: afterwards memory that they use may be freed."""
    interruption: BaseException | None = None
    while True:
        try:
            concurrent.futures.wait(futures)
            break
        except BaseException as error:  # noqa: BLE001 - it is raised below
            interruption = error
    if interruption is not None:
        raise interruption


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Make torch's operations in the calling thread use no other thread, until the end of the block."""
    limit, n = _limit(), torch.get_num_threads()
    if limit is None or n == 1:
        yield
        return
    limit(1)
    try:
        yield
    finally:
        limit(n)


@cache
def _limit() -> Callable[[int], Any] | None:
    """OpenMP's function that sets the number of threads for the calling thread. `torch.set_num_threads` would do so for
    threads that have not used torch yet and for other libraries, too.

    Returns:
        None if there is none, or if torch does not use it.
    """
    function: Callable[[int], Any] | None = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if function is None:
        return None
    n = torch.get_num_threads()
    function(n + 1)
    is_of_torch = torch.get_num_threads() == n + 1
    function(n)
    return function if is_of_torch else None


def _begin_helper() -> None:
    limit = _limit()
    torch.get_num_threads()  # the first call in a thread sets it to torch's default
    if limit is not None:
        limit(1)


class _Helpers:
    """Threads for the jobs of all callers, which exist from the first job on.

    There are no more of them than a job uses: two that take turns would each find the caches of the other.
    """

    def __init__(self) -> None:
        self.begin_process()
        os.register_at_fork(after_in_child=self.begin_process)

    def begin_process(self) -> None:
        """Forget threads, and a lock that another thread may have held: a forked process has neither."""
        self._lock = threading.Lock()
        self._threads: dict[int, ThreadPoolExecutor] = {}
        """The threads of jobs that use so many."""

    def submit(self, n: int, waiting: deque[Part]) -> Future[None]:
        """Run parts in one of n threads."""
        with self._lock:
            if n not in self._threads:
                self._threads[n] = ThreadPoolExecutor(n, "rows", _begin_helper)
            return self._threads[n].submit(_work, waiting)


@cache
def _helpers() -> _Helpers:
    return _Helpers()

"""Work that goes through all of an array: in few threads of its own, one scan at a time for a client, shared by all
that ask for the same, and stopped when nobody waits for it.
"""

import asyncio
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from fastapi import Request

from actstore.query.problem import Problem
from actstore.query.server.connections.disconnect import wait_for_disconnect
from actstore.query.server.monitoring.metrics import Metrics
from actstore.query.server.sharing.torch_loading import use_one_torch_thread

T = TypeVar("T")
Look = Callable[[int], None]
"""Called after each piece with the number of rows that were scanned; raises `StoppedError` when nobody waits any more.
"""

_LATEST_S: Final = 60
"""Seconds at most after which a client that finds too many waiting scans is told to ask again."""


@dataclass(frozen=True)
class Words:
    """What scans are called in messages."""

    one: str = "a scan of all rows"
    own: str = "searches, or orders of rows that must be looked for,"
    others: str = "searches"


class StoppedError(Exception):
    """Raised in a scan that nobody waits for."""


class _Scan:
    def __init__(self, client: str, work: Callable[[Look], Any], metrics: Metrics) -> None:
        self.client = client
        self.work = work
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.n_waiting = 0
        self.stop = threading.Event()
        self.begun = 0.0
        self._metrics = metrics

    def look(self, n_rows: int) -> None:
        """Count the rows of a piece, and stop the scan if nobody waits: see `Look`."""
        self._metrics.count_scanned(n_rows)
        if self.stop.is_set():
            raise StoppedError


class Scans:
    """The scans of one process. Only its event loop may call them."""

    def __init__(
        self,
        n_threads: int,
        timeout_s: float,
        metrics: Metrics,
        *,
        n_waiting: int = 64,
        n_waiting_per_client: int = 8,
        words: Words = Words(),
    ) -> None:
        """
        Args:
            n_threads: scans at once.
            timeout_s: seconds that a request waits for a scan.
            metrics: counters of the rows.
            n_waiting: scans of all clients that wait for a thread, at most.
            n_waiting_per_client: the same for each client.
            words: what scans are called in messages.
        """
        self._n_waiting = n_waiting
        self._n_waiting_per_client = n_waiting_per_client
        self._words = words
        self._n_threads = n_threads
        self._timeout_s = timeout_s
        self._metrics = metrics
        # More threads of torch would take the cores that send slices.
        self._threads = ThreadPoolExecutor(n_threads, "scan", use_one_torch_thread)
        self._wanted: dict[Hashable, _Scan] = {}
        """Scans that wait or run, and are not stopped, by key."""
        self._waiting: deque[tuple[Hashable, _Scan]] = deque()
        self._running: dict[_Scan, None] = {}
        self._mean_s = 1.0

    async def run(self, request: Request, client: str, key: Hashable, work: Callable[[Look], T]) -> T:
        """Run a scan, or join one with the same key, and return its result.

        Args:
            request: request whose client may leave.
            client: client; each has one running scan at a time.
            key: equal for scans with the same result.
            work: called in a thread, unless a scan with the same key is under way.

        Raises:
            Problem: too many scans wait, or the scan took too long.
        """
        scan = self._wanted.get(key) or self._begin(client, key, work)
        scan.n_waiting += 1
        leaving = asyncio.ensure_future(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait(
                (scan.done, leaving), timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if scan.done.done():
                result: T = scan.done.result()
                return result
            if leaving.done():
                # Nobody reads this reply; the status is the one that metrics of other servers use.
                raise Problem(499, "busy", "the client has left")
        finally:
            leaving.cancel()
            scan.n_waiting -= 1
            if not scan.n_waiting and not scan.done.done():
                self._stop(key, scan)
        raise Problem(
            503,
            "busy",
            f"the request needs {self._words.one}, which did not end within {self._timeout_s:g} s; ask again",
            self._retry_after(),
        )

    def _begin(self, client: str, key: Hashable, work: Callable[[Look], Any]) -> _Scan:
        n_own = Counter(scan.client for _, scan in self._waiting)[client]
        if n_own >= self._n_waiting_per_client:
            raise Problem(
                429,
                "too-many",
                f"{n_own} {self._words.own} of this client wait for their turn; ask again when some are done",
                self._retry_after(),
            )
        if len(self._waiting) >= self._n_waiting:
            raise Problem(
                503,
                "busy",
                f"{self._n_waiting} {self._words.others} of other clients wait for their turn; ask again",
                self._retry_after(),
            )
        scan = self._wanted[key] = _Scan(client, work, self._metrics)
        self._waiting.append((key, scan))
        self._start()
        return scan

    def _start(self) -> None:
        """Start waiting scans, in the order in which they came, but only one of each client."""
        busy = {scan.client for scan in self._running}
        for key, scan in tuple(self._waiting):
            if len(self._running) >= self._n_threads:
                return
            if scan.client not in busy:
                busy.add(scan.client)
                self._waiting.remove((key, scan))
                self._running[scan] = None
                scan.begun = time.monotonic()
                loop = asyncio.get_running_loop()
                future = loop.run_in_executor(self._threads, scan.work, scan.look)
                future.add_done_callback(partial(self._end, key, scan))

    def _end(self, key: Hashable, scan: _Scan, future: "asyncio.Future[Any]") -> None:
        del self._running[scan]
        self._mean_s += 0.2 * (time.monotonic() - scan.begun - self._mean_s)
        if self._wanted.get(key) is scan:
            del self._wanted[key]
        error = None if future.cancelled() else future.exception()
        if scan.n_waiting and not future.cancelled():
            if error is None:
                scan.done.set_result(future.result())
            else:
                scan.done.set_exception(error)
        self._start()

    def _stop(self, key: Hashable, scan: _Scan) -> None:
        scan.stop.set()
        if self._wanted.get(key) is scan:
            del self._wanted[key]
        if (key, scan) in self._waiting:
            self._waiting.remove((key, scan))

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(min(_LATEST_S, max(1, math.ceil(self._mean_s))))}

    def close(self) -> None:
        """End all threads, each after its current piece."""
        for scan in (*self._running, *(scan for _, scan in self._waiting)):
            scan.stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

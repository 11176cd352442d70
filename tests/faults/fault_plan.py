"""Plans of faults: which requests suffer what, on their way through a `tests.faults.proxy`."""

import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Fault = Literal["refuse", "break", "lose reply", "cut body", "slow body"]
"""``refuse``: 503 SlowDown, nothing forwarded. ``break``: 500 InternalError, nothing forwarded. ``lose reply``: the
server handles the request, but the client gets no reply. ``cut body``: half of the reply. ``slow body``: the reply at
100 kB/s.
"""


@dataclass(frozen=True)
class Request:
    """One request of a client, as plans see it."""

    method: str
    key: str
    """Path below the bucket and the first folder, which is the store's, or the query, with a star for random parts."""
    turn: int
    """Number of earlier requests with this method and key, so that retries count up."""

    @property
    def is_write(self) -> bool:
        return self.method in ("PUT", "POST", "DELETE")


Plan = Callable[[Request], Fault | None]


def at_random(rate: float, fault: Fault, seed: int = 0, methods: str = "GET HEAD PUT POST DELETE") -> Plan:
    """A fault for a share of the requests, the same ones in every run, in any order of threads."""

    def plan(request: Request) -> Fault | None:
        drawn = zlib.crc32(f"{seed} {request.method} {request.key} {request.turn}".encode()) / 2**32
        return fault if request.method in methods.split() and drawn < rate else None

    return plan


def always(fault: Fault) -> Plan:
    """A fault for every request."""
    return lambda _: fault


def after(n_writes: int, plan: Plan) -> Plan:
    """A plan that begins after a number of writes."""
    lock, seen = threading.Lock(), [0]

    def late(request: Request) -> Fault | None:
        with lock:
            seen[0] += request.is_write
            is_on = seen[0] > n_writes
        return plan(request) if is_on else None

    return late

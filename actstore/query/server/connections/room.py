"""Limits how many connections a process has, and closes idle ones for new ones."""

import contextlib
import resource
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

_RESERVED: Final = 256
"""File descriptors that are kept for files, for storage, and for health checks."""
_SPARE: Final = 32
"""Connections beyond the limit, for health checks while every other connection has a request under way."""
_SPARE_OF_ADDRESS: Final = 4


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on the connections of one process; plain data, so that it can be sent to worker processes."""

    n_connections: Annotated[
        int, "Most connections at once in a process; beyond that, the one idle for longest is closed."
    ] = 1_024
    n_of_address: int = 512
    """Connections at once from one address, unless it forwards for many clients."""
    head_s: Annotated[float, "Seconds within which the URL and headers of a request must come."] = 10.0
    """They count from the start of the connection, or from the first byte; the rest of a body that nobody waits for any
    more has as long.
    """
    keep_alive_s: Annotated[
        int,
        "Seconds for which a connection is kept between two requests; a load balancer in front should use less.",
    ] = 75


class Guest(Protocol):
    """A connection as `Room` sees it."""

    address: str
    """Address of the client, without its port, as `counted_as` gives it."""
    is_of_many: bool
    """Whether many clients come from that address, so that it may have all connections."""
    is_spare: bool
    """Whether the connection is beyond the limit, so that only health checks are answered."""

    def drop(self) -> None:
        """End the connection at once."""

    def describe(self) -> str:
        """The request that is under way, for operators."""
        ...


class Room:
    """The connections of a process, from when they are accepted. For the thread of one event loop."""

    def __init__(self, limits: ConnectionLimits) -> None:
        """
        Args:
            limits: limits; fewer connections are allowed where the system gives fewer file descriptors.
        """
        self._n_allowed = max(1, min(limits.n_connections, _n_descriptors() - _RESERVED))
        self._n_of_address = min(limits.n_of_address, self._n_allowed)
        self._n = 0
        self._n_spare = 0
        self._counts: Counter[str] = Counter()
        self._spare_counts: Counter[str] = Counter()
        """Number of connections by address."""
        self._idle: dict[str, OrderedDict[Guest, None]] = {}
        """Connections without a request under way, by address; the one that has waited longest is first."""
        self._idle_spares: OrderedDict[Guest, None] = OrderedDict()
        """Idle connections for health checks, in the same order. They are beyond the limit, so nothing else can take
        their places.
        """
        self.at_work: set[Guest] = set()
        """Connections with a request under way."""
        self.is_ending = False
        """Whether requests that the shutdown waits for are logged already."""

    def admit(self, guest: Guest) -> bool:
        """Take a new connection in, which is idle; False if it must be closed.

        When there are too many, an idle one is dropped: of the same address if that has too many, else of the address
        with the most idle ones; its client can connect again. If all have a request under way, a few more are admitted
        for health checks only, and when there are too many of these, the one that was idle longest is dropped for the
        next one.
        """
        address = guest.address
        is_own = not guest.is_of_many and self._counts[address] >= self._n_of_address
        if is_own or self._n - self._n_spare >= self._n_allowed:
            idle = self._idle.get(address) if is_own else max(self._idle.values(), key=len, default=None)
            if idle:
                longest = next(iter(idle))
                self._forget(longest)
                longest.drop()
            elif self._has_spare(address):
                guest.is_spare = True
                self._n_spare += 1
                self._spare_counts[address] += 1
            else:
                return False
        self._n += 1
        self._counts[address] += 1
        self.idle(guest)
        return True

    def _has_spare(self, address: str) -> bool:
        """Find a place for one more health check, and drop an idle one for it if there must be."""
        is_own = self._spare_counts[address] >= _SPARE_OF_ADDRESS
        if not is_own and self._n_spare < _SPARE:
            return True
        idle = (guest for guest in self._idle_spares if not is_own or guest.address == address)
        longest = next(idle, None)
        if longest is None:
            return False
        self._forget(longest)
        longest.drop()
        return True

    def idle(self, guest: Guest) -> None:
        """Note that a connection has no request under way."""
        self.at_work.discard(guest)
        if guest.is_spare:
            self._idle_spares[guest] = None
            return
        self._idle.setdefault(guest.address, OrderedDict())[guest] = None

    def busy(self, guest: Guest) -> None:
        """Note that a connection has a request under way."""
        self._forget(guest)
        self.at_work.add(guest)

    def leave(self, guest: Guest) -> None:
        """Note that a connection is closed."""
        self._forget(guest)
        self.at_work.discard(guest)
        self._n -= 1
        self._n_spare -= guest.is_spare
        for counts, n in ((self._counts, 1), (self._spare_counts, int(guest.is_spare))):
            counts[guest.address] -= n
            if not counts[guest.address]:
                del counts[guest.address]

    def _forget(self, guest: Guest) -> None:
        """Take a connection out of the idle ones."""
        self._idle_spares.pop(guest, None)
        idle = self._idle.get(guest.address)
        if idle is not None:
            idle.pop(guest, None)
            if not idle:
                del self._idle[guest.address]


def raise_descriptor_limit() -> None:
    """Raise the soft limit on file descriptors to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit that it does not reveal
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _n_descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft

"""Accepts connections: an event loop whose servers admit as many as there is room for."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Final

import uvloop

from actstore.query.server.connections.addresses import UNIX, Proxies
from actstore.query.server.connections.connection import Connection
from actstore.query.server.connections.room import ConnectionLimits, Room
from actstore.query.server.connections.socket_writes import WritingThreads

_PAUSE_S: Final = 0.1
"""Seconds to wait after the system gave no connection, as without file descriptors."""
_ACCEPTED_AT_ONCE: Final = 32
_UNIX_NBYTES: Final = 1 << 20
"""Bytes of the send buffer of a Unix socket, as far as the system allows; it does not grow by itself as that of TCP
does.
"""
_LOG_S: Final = 5.0
"""Seconds between two log lines on which requests a shutdown waits for."""
_SHOWN: Final = 5
_LOG: Final = logging.getLogger(__name__)


class ConnectionFactory:
    """Makes the protocol of each connection for uvicorn. Worker processes get a copy with a `Room` of their own."""

    def __init__(self, limits: ConnectionLimits, max_request: int, stall_s: float, proxies: Proxies) -> None:
        """
        Args:
            limits: limits on the connections of a process.
            max_request: bytes of the body of a request at most.
            stall_s: seconds that a reply waits for a client that takes none of it.
            proxies: proxies whose connections carry the requests of many clients.
        """
        self.limits = limits
        self._proxies = proxies
        self._max_request = max_request
        self._stall_s = stall_s
        self._room: Room | None = None
        self._threads: WritingThreads | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_room": None, "_threads": None}

    @property
    def room(self) -> Room:
        """The connections of this process."""
        if self._room is None:
            self._room = Room(self.limits)
        return self._room

    def is_of_many(self, peer: str) -> bool:
        """Whether the connections from an address, or of the Unix socket, carry requests of many clients."""
        return peer == UNIX or self._proxies.trusts(peer)

    def __call__(self, *args: Any, **kwargs: Any) -> Connection:
        """Make a connection that is not admitted yet."""
        if self._threads is None:
            self._threads = WritingThreads()
        return Connection(
            *args,
            **kwargs,
            room=self.room,
            is_of_many=self.is_of_many,
            limits=self.limits,
            max_request=self._max_request,
            stall_s=self._stall_s,
            threads=self._threads,
        )


class AcceptingLoop(uvloop.Loop):
    """uvloop, but a connection takes its place when it is accepted, before a handshake of TLS; uvloop's own servers
    accept every connection.
    """

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], Connection],
        *,
        sock: socket.socket,
        ssl: ssl.SSLContext | None = None,
        backlog: int,
    ) -> "Acceptor":
        """Implements the call that uvicorn makes for each socket."""
        sock.listen(backlog)
        # Nobody can listen in on a Unix socket, so it needs no TLS.
        return Acceptor(self, protocol_factory, sock, None if sock.family == socket.AF_UNIX else ssl)


class Acceptor:
    """Accepts connections, and looks like a server of asyncio to uvicorn."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: Callable[[], Connection],
        listening: socket.socket,
        context: ssl.SSLContext | None,
    ) -> None:
        """
        Args:
            loop: event loop of the server.
            factory: makes the protocol of a connection.
            listening: socket, which may be shared with other processes.
            context: settings for TLS; None without TLS.
        """
        listening.setblocking(False)
        self._loop = loop
        self._factory = factory
        self._listening = listening
        self._context = context
        self._room: Room | None = None
        """The connections of this process, once there was one."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._listen()

    def close(self) -> None:
        """Accept no more, and log now and then which requests the shutdown waits for."""
        self._is_closed = True
        self._loop.remove_reader(self._listening)
        if self._room is not None and not self._room.is_ending:
            self._room.is_ending = True
            self._begin(self._log_waiting(self._room))

    async def wait_closed(self) -> None:
        """Implements `asyncio.Server.wait_closed`; there is nothing to wait for."""

    async def _log_waiting(self, room: Room) -> None:
        while at_work := room.at_work:
            shown = sorted(connection.describe() for connection in at_work)[:_SHOWN]
            more = f" and {len(at_work) - _SHOWN} more" if len(at_work) > _SHOWN else ""
            what = "a request" if len(at_work) == 1 else f"{len(at_work)} requests"
            _LOG.warning("ending; waiting for %s: %s%s", what, ", ".join(shown), more)
            await asyncio.sleep(_LOG_S)

    def _listen(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        """Accept the waiting connections, but only some at once: those that are open already must get on, too."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:
                _LOG.warning("no connection can be accepted for a moment: %s", error.strerror)
                self._loop.remove_reader(self._listening)
                self._loop.call_later(_PAUSE_S, self._listen)
                return
            connection = self._factory()
            self._room = connection.room
            connection.set_peer(address[0] if isinstance(address, tuple) else UNIX)
            if connection.room.admit(connection):
                accepted.setblocking(False)
                if accepted.family == socket.AF_UNIX:
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_NBYTES)
                connection.accepted = accepted
                self._begin(self._connect(connection, accepted))
            else:
                connection.report_refusal(None)
                accepted.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _connect(self, connection: Connection, accepted: socket.socket) -> None:
        timeout = None if self._context is None else connection.limits.head_s
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=self._context, ssl_handshake_timeout=timeout
            )
        except OSError:  # the client is gone, was dropped for another one, or speaks no TLS
            if connection.transport is None:
                accepted.close()
                connection.room.leave(connection)

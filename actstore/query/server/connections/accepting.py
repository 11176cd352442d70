"""Accepting connections: an event loop whose servers let in as many as there is room for."""

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
"""After the system gave no connection, as without file descriptors."""
_ACCEPTED_AT_ONCE: Final = 32
_UNIX_NBYTES: Final = 1 << 20
"""That a Unix socket holds, as far as the system allows; its buffer does not grow by itself as that of TCP does."""
_TELL_S: Final = 5.0
"""Between two lines on what the end waits for."""
_SHOWN: Final = 5
_LOG: Final = logging.getLogger(__name__)


class ConnectionFactory:
    """Makes the protocol of each connection, as uvicorn asks for it. Worker processes get a copy with a room of their
    own.
    """

    def __init__(self, limits: ConnectionLimits, max_request: int, stall_s: float, proxies: Proxies) -> None:
        """
        Args:
            limits: of the connections of a process.
            max_request: bytes of a body.
            stall_s: seconds without a client taking any of a reply.
            proxies: whose connections are those of many clients.
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
        """Of this process."""
        if self._room is None:
            self._room = Room(self.limits)
        return self._room

    def is_of_many(self, peer: str) -> bool:
        """Whether the connections from an address, or of the Unix socket, are of many clients."""
        return peer == UNIX or self._proxies.trusts(peer)

    def __call__(self, *args: Any, **kwargs: Any) -> Connection:
        """A connection that has not been let in yet."""
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
    accept whatever comes.
    """

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], Connection],
        *,
        sock: socket.socket,
        ssl: ssl.SSLContext | None = None,
        backlog: int,
    ) -> "Acceptor":
        """As uvicorn calls it."""
        sock.listen(backlog)
        # Nobody listens in on a Unix socket.
        return Acceptor(self, protocol_factory, sock, None if sock.family == socket.AF_UNIX else ssl)


class Acceptor:
    """What uvicorn takes for a server of asyncio."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: Callable[[], Connection],
        listening: socket.socket,
        context: ssl.SSLContext | None,
    ) -> None:
        """
        Args:
            loop: that runs it.
            factory: of protocols.
            listening: that may be shared with other processes.
            context: of TLS.
        """
        listening.setblocking(False)
        self._loop = loop
        self._factory = factory
        self._listening = listening
        self._context = context
        self._room: Room | None = None
        """Of the connections, once there was one."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._listen()

    def close(self) -> None:
        """Accept no more, and say now and then which requests the end waits for."""
        self._is_closed = True
        self._loop.remove_reader(self._listening)
        if self._room is not None and not self._room.is_ending:
            self._room.is_ending = True
            self._begin(self._tell(self._room))

    async def wait_closed(self) -> None:
        """As asyncio has it; there is nothing to wait for."""

    async def _tell(self, room: Room) -> None:
        while at_work := room.at_work:
            shown = sorted(connection.describe() for connection in at_work)[:_SHOWN]
            more = f" and {len(at_work) - _SHOWN} more" if len(at_work) > _SHOWN else ""
            what = "a request" if len(at_work) == 1 else f"{len(at_work)} requests"
            _LOG.warning("ending; waiting for %s: %s%s", what, ", ".join(shown), more)
            await asyncio.sleep(_TELL_S)

    def _listen(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        """As many as wait, but for some at most: those that are there already must get on, too."""
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
            connection.comes_from(address[0] if isinstance(address, tuple) else UNIX)
            if connection.room.admit(connection):
                accepted.setblocking(False)
                if accepted.family == socket.AF_UNIX:
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_NBYTES)
                connection.accepted = accepted
                self._begin(self._connect(connection, accepted))
            else:
                connection.refused(None)
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
        except OSError:  # gone already, dropped for another one, or it speaks no TLS
            if connection.transport is None:
                accepted.close()
                connection.room.leave(connection)

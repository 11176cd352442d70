"""Writes the bodies of replies past the transport, and hangs up on clients that take none of them."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final, Protocol

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from actstore.loader.rows import mapping
from actstore.query.server.connections.socket_writes import (
    ConnectionGoneError,
    SocketWriter,
    Vectors,
    WritingThreads,
)

BODY: Final = "actstore.body"
"""Key of the ASGI scope: the `BodyWriter` of the reply."""
_ROUNDS: Final = 3


class BodyConnection(Protocol):
    """What a `BodyWriter` needs of a connection."""

    transport: asyncio.Transport
    threads: WritingThreads
    stall_s: float
    """Seconds that a reply waits for a client that takes none of it."""
    writer: SocketWriter | None
    """Writer of the body that is under way; None if there is none."""


def reset(transport: Any) -> None:
    """Hang up on a client that takes nothing, and have the system drop the data that waits for it. The system would
    otherwise keep offering it for minutes, from its own memory, before the client learns that this is the end.
    """
    ours = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):  # it is closed already
        if ours is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class BodyWriter:
    """Writes the body of one reply past the transport, if that is possible."""

    def __init__(self, connection: BodyConnection, cycle: RequestResponseCycle) -> None:
        """
        Args:
            connection: connection of the request.
            cycle: uvicorn's cycle of the request.
        """
        self._connection = connection
        self._cycle = cycle
        self.is_over = False
        """Whether another reply was sent instead of this one: nothing more may be written then."""
        self.nbytes = 0
        """Bytes that were written past the transport."""

    async def begin(self) -> bool:
        """Whether the body can be written past the transport: not with TLS, not while the head of the reply is stuck,
        and not when another reply was sent.
        """
        transport = self._connection.transport
        if self.is_over or transport.get_extra_info("sslcontext") is not None or not mapping.is_supported():
            return False
        for _ in range(_ROUNDS):  # of the loop, which sends what was written in the round before
            if transport.is_closing() or not transport.get_write_buffer_size():
                break
            await asyncio.sleep(0)
        if transport.is_closing() or transport.get_write_buffer_size():
            return False
        file = transport.get_extra_info("socket").fileno()
        try:
            self._connection.writer = SocketWriter(self._connection.threads, file, self._connection.stall_s)
        except OSError:  # no descriptor is left
            return False
        return True

    async def write(self, vectors: Iterator[Vectors]) -> bool:
        """Write vectors, as `SocketWriter.write` does.

        Returns:
            Whether the client is still there.

        Raises:
            OSError: memory cannot be read.
            TimeoutError: the client takes nothing, or next to nothing.
        """
        writer = self._connection.writer
        assert writer is not None
        try:
            await writer.write(vectors)
        except TimeoutError:
            reset(self._connection.transport)
            raise
        except ConnectionGoneError:
            self._cycle.disconnected = True
            self._cycle.message_event.set()
            self._connection.transport.abort()
            return False
        finally:
            self._cycle.expected_content_length -= writer.nbytes - self.nbytes
            self.nbytes = writer.nbytes
        return True

    def end(self) -> None:
        """Give the writer back, after all or a part of the body."""
        writer, self._connection.writer = self._connection.writer, None
        assert writer is not None
        writer.close()

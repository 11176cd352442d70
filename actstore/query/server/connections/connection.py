"""One connection: uvicorn's HTTP protocol, with limits on everything that may come before a request is admitted."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any, Final

import httptools
from uvicorn._types import ASGIReceiveEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from actstore.query.problem import Problem
from actstore.query.server.connections.addresses import address_text, counted_as
from actstore.query.server.connections.body_writer import BODY, BodyWriter, reset
from actstore.query.server.connections.room import ConnectionLimits, Room
from actstore.query.server.connections.socket_writes import (
    SLOWEST,
    SocketWriter,
    WritingThreads,
)
from actstore.query.wire import PROBLEM

SPARE: Final = "actstore.spare"
"""Key of the ASGI scope: whether the connection is for health checks only."""
REFUSED: Final = "actstore.refused"
"""Key of the application's state: a function that is called when a connection was refused before there was a request,
with the address of the client, the status of the reply if there was one, and seconds.
"""
_MAX_BESIDE: Final = 128 << 10
"""Bytes of a message without its body at most: line, headers, sizes of chunks, trailers."""
_MAX_URL: Final = 64 << 10
"""Bytes of a URL that the parser takes at most."""
_MAX_BESIDE_AHEAD: Final = 64 << 10
"""Bytes of the heads of all pipelined requests that wait for the one at work, at most."""
_MAX_HEADERS: Final = 128
"""Headers and trailers of a request at most."""
_MAX_AHEAD: Final = 64
"""Pipelined requests that wait for the one at work, at most."""
_MAX_LOGGED: Final = 200
"""Bytes of a path that logs show at most."""
_LINGER_S: Final = 30.0
_LINGER_QUIET_S: Final = 5.0
_LINGER_NBYTES: Final = 32 << 20
"""Limits, in all and without data, on what is read and dropped of a client that sends more than is wanted. It lets the
client read the reply: a connection that is closed with data unread is reset.
"""
_REASONS: Final = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class Connection(HttpToolsProtocol):
    """A connection, closed when a head does not come in time or is too large, or when a client sends a body that nobody
    reads.
    """

    def __init__(
        self,
        *args: Any,
        room: Room,
        is_of_many: Callable[[str], bool],
        limits: ConnectionLimits,
        max_request: int,
        stall_s: float,
        threads: WritingThreads,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args: arguments of uvicorn.
            room: connections of the process; the caller admits this one there.
            is_of_many: tells whether connections from an address carry requests of many clients.
            limits: limits on the connection.
            max_request: bytes of the body of a request at most.
            stall_s: seconds that a reply waits for a client that takes none of it.
            threads: threads that write large bodies.
            kwargs: keyword arguments of uvicorn.
        """
        super().__init__(*args, **kwargs)
        self.url = b""
        self.address = ""
        self._peer = ""
        self.is_of_many = self.is_spare = False
        self.accepted: socket.socket | None = None
        """Accepted socket while there is no transport, which takes a while with TLS."""
        self._is_dropped = False
        self.room = room
        self._is_of_many = is_of_many
        self.limits = limits
        self._max_request = max_request
        self.stall_s = stall_s
        self.threads = threads
        self.writer: SocketWriter | None = None
        """Writer of a body that is sent past the transport; None if there is none."""
        self._n_ahead = 0
        self._request_line = "a request"
        self._n_beside = 0
        self._n_body = 0
        self._n_headers = 0
        self._is_head_complete = False
        self._is_message_complete = True
        self._begun = self._head_begun = time.monotonic()
        self._is_ending = False
        """Whether the server is shutting down."""
        self._lingers_until: float | None = None
        """Time until which incoming data is dropped; None if it is not."""
        self._n_lingered = 0
        self._clock: asyncio.TimerHandle | None = None
        """Timer by which a head, or the rest of a body, must have arrived."""
        self._stall_clock: asyncio.TimerHandle | None = None
        """Timer by which the client must have taken the data that waits for it."""

    def set_peer(self, peer: str) -> None:
        """Note the address of the client, before the connection is admitted.

        Args:
            peer: address of the client, or `UNIX`.
        """
        self._peer = address_text(peer)
        self.address = counted_as(peer)
        self.is_of_many = self._is_of_many(peer)

    def report_refusal(self, status: int | None) -> None:
        """Report that the connection had no valid request.

        Args:
            status: status of the reply; None if there was none.
        """
        tell = self.app_state.get(REFUSED)
        if tell is not None:
            tell(self._peer, status, time.monotonic() - self._head_begun)

    def drop(self) -> None:
        """Implements `Guest.drop`."""
        if self.transport is not None:
            self.transport.abort()
        elif self.accepted is not None:
            self._is_dropped = True
            with contextlib.suppress(OSError):  # the client has closed it already
                self.accepted.shutdown(socket.SHUT_RDWR)

    def describe(self) -> str:
        """Implements `Guest.describe`."""
        return f"{self._request_line} ({time.monotonic() - self._begun:.0f} s)"

    def connection_made(self, transport: Any) -> None:
        """Implements `asyncio.Protocol.connection_made`."""
        super().connection_made(transport)
        self.accepted = None
        if self._is_dropped:
            transport.abort()
        else:
            self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Implements `asyncio.Protocol.connection_lost`."""
        self._stop_clock()
        self._stop_stall_clock()
        if self.writer is not None:
            self.writer.give_up()
        self.room.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Implements `asyncio.Protocol.data_received`."""
        if self.transport.is_closing():
            return
        if self._lingers_until is not None:
            self._n_lingered += len(data)
            self._start_linger_clock()
            return
        self._unset_keepalive_if_required()
        if self._is_message_complete and self._clock is None and self._is_idle:
            self._start_clock()
        self._n_beside += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered as if the client had not asked for another protocol, but what follows cannot be parsed any more.
            if self._has_body():
                self.transport.abort()
            elif self.cycle is not None:
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            if not self._is_over:
                self._refuse(400, self._explain_error())
            return
        if self._n_beside > _MAX_BESIDE and not self._is_over:
            self._refuse(
                431, f"a URL with all headers can have {_MAX_BESIDE} bytes; send what is longer in a body"
            )

    @property
    def _is_over(self) -> bool:
        return self.transport.is_closing() or self._lingers_until is not None

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        """Implements the callback of httptools."""
        if self._lingers_until is not None:
            raise ValueError("no more requests")  # ends the parsing
        self._is_head_complete = self._is_message_complete = False
        self._n_headers = self._n_body = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Implements the callback of httptools; it is called for trailers, too, which nobody reads."""
        self._n_headers += 1
        if self._n_headers > _MAX_HEADERS:
            raise ValueError("too many headers")  # ends the parsing
        if not self._is_head_complete:
            super().on_header(name, value)

    def _explain_error(self) -> str:
        """Explain why the parser refused a request."""
        if self._n_headers > _MAX_HEADERS:
            return f"a request can have {_MAX_HEADERS} headers and trailers; send fewer"
        if len(self.url) >= _MAX_URL:
            return f"a URL can have {_MAX_URL} bytes; send what is longer in a body"
        if self._is_head_complete and not self._is_idle:
            return f"{_MAX_AHEAD} requests can be sent before the one at work is answered; wait for replies"
        return "this is no HTTP that an actstore server understands"

    def on_headers_complete(self) -> None:
        """Implements the callback of httptools."""
        self._is_head_complete = True
        self._stop_clock()
        if not self._is_idle:
            self._n_ahead += self._n_beside
            if len(self.pipeline) >= _MAX_AHEAD or self._n_ahead > _MAX_BESIDE_AHEAD:
                raise ValueError("too many requests ahead")
        super().on_headers_complete()
        self.cycle.transport = _TransportOfReply(self.transport, self._hang_up)  # type: ignore[assignment]
        if self.expect_100_continue:
            self._handle_expect(self.cycle)
        if self._is_idle or not self.pipeline:
            self._begun = time.monotonic()
            raw_path = self.scope["raw_path"][:_MAX_LOGGED].decode("ascii", "replace")
            self._request_line = f"{self.scope['method']} {raw_path}"
        self.room.busy(self)
        self.scope[SPARE] = self.is_spare  # type: ignore[typeddict-unknown-key]
        self.scope[BODY] = BodyWriter(self, self.cycle)  # type: ignore[typeddict-unknown-key]

    def on_body(self, body: bytes) -> None:
        """Implements the callback of httptools."""
        self._n_beside -= len(body)
        self._n_body += len(body)
        super().on_body(body)
        if self._n_body > 2 * self._max_request and self._is_idle:
            self._linger()  # the reply was sent long ago

    def on_message_complete(self) -> None:
        """Implements the callback of httptools."""
        if self._lingers_until is not None:
            return
        self._is_message_complete = True
        self._n_beside = 0
        self._stop_clock()
        super().on_message_complete()
        if self._is_idle and not self._is_over:
            # The rest of a body came after the reply: the idle time between two requests begins now.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.limits.keep_alive_s, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Implements the callback of uvicorn."""
        if self._lingers_until is not None:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if not self.pipeline:
            self._n_ahead = 0
        if self._is_idle:
            self.room.idle(self)
            if self.transport.is_closing():
                self._start_stall_clock()  # the client must still take the rest
            elif not self._is_message_complete:
                self._start_clock()

    def pause_writing(self) -> None:
        """Implements `asyncio.Protocol.pause_writing`: the client takes less than is sent."""
        super().pause_writing()
        self._start_stall_clock()

    def resume_writing(self) -> None:
        """Implements `asyncio.Protocol.resume_writing`."""
        super().resume_writing()
        if not self.transport.is_closing():  # the timer stays on for the rest that the client must still take
            self._stop_stall_clock()

    def shutdown(self) -> None:
        """Implements the method of uvicorn: end after the reply that is under way."""
        self._is_ending = True
        if self._lingers_until is not None:
            self._close()
        else:
            super().shutdown()

    def _handle_expect(self, cycle: RequestResponseCycle) -> None:
        """Close the connection after the reply, unless the body was read: a client that waits for 100 Continue in vain
        may not send the body, and its next request would then be taken for it.
        """
        keeps, receive = cycle.keep_alive, cycle.receive
        cycle.keep_alive = False

        async def received() -> ASGIReceiveEvent:
            if cycle.waiting_for_100_continue:
                cycle.keep_alive = keeps and not self._is_ending
            return await receive()

        cycle.receive = received  # type: ignore[method-assign]

    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
            for name, value in self.headers
        )

    def _hang_up(self) -> None:
        """Hang up after a reply, or in the middle of one that cannot be finished."""
        if self.cycle.response_complete and not self._is_message_complete and not self.pipeline:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Send nothing more, and close a little later: data that still comes until then is dropped."""
        if self._is_over:
            return
        self._stop_clock()
        self._unset_keepalive_if_required()
        self._lingers_until = time.monotonic() + _LINGER_S
        if self.transport.can_write_eof():  # not over TLS, where the length shows a client the end
            self.transport.write_eof()
        self.flow.resume_reading()
        self.room.idle(self)
        self._start_linger_clock()

    def _start_linger_clock(self) -> None:
        assert self._lingers_until is not None
        self._stop_clock()
        left = min(_LINGER_QUIET_S, self._lingers_until - time.monotonic())
        if left <= 0 or self._n_lingered > _LINGER_NBYTES:
            self._close()
        else:
            self._clock = self.loop.call_later(left, self._time_out)

    def _close(self) -> None:
        """Close once the client has taken the data that waits for it, or its time is over."""
        self.transport.close()
        self._start_stall_clock()

    def _start_stall_clock(self) -> None:
        self._stop_stall_clock()
        seconds = self.stall_s + self.transport.get_write_buffer_size() / SLOWEST
        self._stall_clock = self.loop.call_later(seconds, reset, self.transport)

    def _stop_stall_clock(self) -> None:
        if self._stall_clock is not None:
            self._stall_clock.cancel()
            self._stall_clock = None

    def _start_clock(self) -> None:
        self._stop_clock()
        self._head_begun = time.monotonic()
        self._clock = self.loop.call_later(self.limits.head_s, self._time_out)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _time_out(self) -> None:
        self._clock = None
        if self.transport.is_closing():
            return
        if self._is_message_complete or self._lingers_until is not None:
            self._close()
        elif self._is_head_complete:
            self._linger()
        else:
            self._refuse(408, f"a request must be there within {self.limits.head_s:g} s of its first byte")

    def _refuse(self, status: int, detail: str) -> None:
        """Answer an invalid request, and hang up."""
        if not self._is_idle:
            if self.pipeline or self.cycle.response_started:
                self.transport.abort()  # a client must not take this for a part of the reply under way
                self.report_refusal(None)
                return
            self.cycle.disconnected = True  # nothing else is sent
            self.cycle.message_event.set()
        body = json.dumps(Problem(status, "invalid", detail).document).encode()
        fields = {
            "content-type": PROBLEM,
            "content-length": str(len(body)),
            "connection": "close",
            "cross-origin-resource-policy": "same-origin",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.transport.write(f"HTTP/1.1 {status} {_REASONS[status]}\r\n{head}\r\n".encode() + body)
        self.report_refusal(status)
        self._linger()


class _TransportOfReply:
    """The transport as a reply sees it, with another ``close``."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        """
        Args:
            transport: transport to write to.
            close: called instead of the transport's own.
        """
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close

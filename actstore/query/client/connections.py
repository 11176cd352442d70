"""Connections to HTTP servers, kept for the next request, and one request over them."""

import contextlib
import http.client
import io
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Final, cast
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError
from actstore.query.client import bounds, unix
from actstore.reason import reason
from actstore.storage.errors import Kind, RequestError

_CONNECT_S: Final = 10
_PLENTY_NBYTES: Final = 1 << 20
_KEPT: Final = 32
"""Idle connections to one server that are kept at most."""

Address = tuple[str, str, int | None]


class Connections:
    """Idle connections by server. Threads may share them; a forked process begins with none."""

    def __init__(self, *, connect_s: float = _CONNECT_S, read_s: float | None = None) -> None:
        """
        Args:
            connect_s: seconds to get a connection.
            read_s: seconds to wait for a reply, in the place of `bounds.READ_S`.
        """
        self._connect_s = connect_s
        self._read_s = bounds.READ_S if read_s is None else read_s
        self._begin_process()

    def _begin_process(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._idle: dict[Address, list[http.client.HTTPConnection]] = {}
        weakref.finalize(self, _close_all, self._idle)

    @cached_property
    def _ssl(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    @contextlib.contextmanager
    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request that does no harm when repeated. The connection is kept if the reply was read to its end.

        Raises:
            RequestError: there is no connection, or no reply.
        """
        if self._process != os.getpid():
            self._begin_process()
        parts = urlsplit(url)
        is_local = parts.scheme == unix.SCHEME
        address = (parts.scheme, unix.socket_path(url) if is_local else parts.hostname or "", parts.port)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        with _translating_errors():
            try:
                connection, reply = self._send(address, method, target, headers, body)
            except (UnicodeError, http.client.InvalidURL) as error:
                raise RequestError(Kind.OTHER, f"no request can be sent there: {reason(error)}") from error
        is_done = False
        try:
            with _translating_errors():
                yield reply
            is_done = reply.isclosed() and not reply.will_close
        finally:
            if is_done:
                self._keep(address, connection)
            else:
                reply.close()
                connection.close()

    def _send(
        self, address: Address, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        while True:
            connection = self._take_idle(address)
            is_new = connection is None
            if connection is None:
                connection = self._open(address)
            try:
                connection.sock.settimeout(self._read_s)
                connection.request(method, target, body, dict(headers))
                return connection, connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                if is_new:
                    raise
                # The server closed it while it was idle; another one may still be open.
            except BaseException:
                connection.close()
                raise

    def _take_idle(self, address: Address) -> http.client.HTTPConnection | None:
        with self._lock:
            idle = self._idle.get(address)
            return idle.pop() if idle else None

    def _open(self, address: Address) -> http.client.HTTPConnection:
        scheme, host, port = address
        connection: http.client.HTTPConnection
        if scheme == unix.SCHEME:
            connection = unix.UnixConnection(host, timeout=self._connect_s)
        elif scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=self._connect_s, context=self._ssl)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._connect_s)
        connection.response_class = _Reply
        connection.connect()
        return connection

    def _keep(self, address: Address, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(address, [])
            if len(idle) < _KEPT:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            _close_all(self._idle)


def _close_all(idle: dict[Address, list[http.client.HTTPConnection]]) -> None:
    for connections in idle.values():
        while connections:
            connections.pop().close()


class _Reply(http.client.HTTPResponse):
    """A reply that must come as fast as `bounds` says."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        raw = cast("socket.SocketIO", self.fp.detach())
        self._paced = _PacedStream(raw, sock)
        self.fp = io.BufferedReader(self._paced)

    def begin(self) -> None:
        """Read the head. http.client takes a head that was cut off for one that ends there; this raises instead."""
        try:
            super().begin()
        except http.client.HTTPException:
            if not self._paced.has_ended:
                raise
        if self._paced.has_ended:
            raise http.client.RemoteDisconnected("the reply was cut off")
        self._paced.begin_body()


class _PacedStream(io.RawIOBase):
    """The stream of a socket, as long as it is fast enough. A limit for each byte would let a server send forever."""

    def __init__(self, raw: socket.SocketIO, sock: socket.socket) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._read_s = self._timeout = sock.gettimeout() or bounds.READ_S
        self._begun = time.monotonic()
        self._n_read = 0
        self._is_head = True
        self._lowest = 0  # unknown: the reply before may have set it
        self.has_ended = False

    def begin_body(self) -> None:
        """Begin the clock anew for the body."""
        self._begun = time.monotonic()
        self._n_read = 0
        self._is_head = False

    def readable(self) -> bool:
        """Implements `io.RawIOBase.readable`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Implements `io.RawIOBase.readinto`.

        Raises:
            TimeoutError: the bytes come too slowly.
            HTTPException: the head is too long.
        """
        if self._is_head and self._n_read > bounds.HEAD_NBYTES:
            raise http.client.HTTPException(f"more than {bounds.HEAD_NBYTES} bytes before a reply")
        earned_s = 0.0 if self._is_head else self._n_read / bounds.SLOWEST
        left = self._begun + self._read_s + earned_s - time.monotonic()
        if left <= 0:
            raise self._timeout_error(self._read_s + earned_s)
        timeout = min(left, self._read_s)
        if timeout != self._timeout:
            self._sock.settimeout(timeout)
            self._timeout = timeout
        self._wake_at(len(buffer))
        try:
            n = self._raw.readinto(buffer) or 0
        except TimeoutError as error:
            raise self._timeout_error(timeout) from error
        self.has_ended = n == 0
        self._n_read += n
        return n

    def _wake_at(self, nbytes: int) -> None:
        """Have the system wake this thread once all that it wants is there, or plenty, and not for each packet."""
        # What is read into the buffer in between may be more than will come.
        lowest = min(nbytes, _PLENTY_NBYTES) if nbytes > io.DEFAULT_BUFFER_SIZE and not self._is_head else 1
        if lowest != self._lowest and not isinstance(self._sock, ssl.SSLSocket):
            with contextlib.suppress(OSError):  # a system without it
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, lowest)
            self._lowest = lowest

    def _timeout_error(self, seconds: float) -> TimeoutError:
        which = "the head" if self._is_head else "the body"
        return TimeoutError(
            f"{self._n_read} bytes of {which} of its reply came, and no more in {seconds:.0f} s"
        )

    def close(self) -> None:
        """Implements `io.RawIOBase.close`."""
        self._raw.close()
        super().close()


def read_into(reply: http.client.HTTPResponse, out: NDArray[np.uint8]) -> None:
    """Read the next bytes of a reply straight from the socket into an array.

    Args:
        reply: reply to read from.
        out: contiguous bytes, [nbytes].

    Raises:
        RequestError: the reply has fewer bytes.
    """
    left = out.data
    while left.nbytes:
        n = reply.readinto(left)
        if not n:
            raise RequestError(Kind.BROKEN, "the reply was cut off")
        left = left[n:]


@contextlib.contextmanager
def _translating_errors() -> Iterator[None]:
    """Turn what sockets and http.client raise into `RequestError`."""
    try:
        yield
    except ActstoreError:
        raise  # an error of the reply; some are an OSError, too
    except ssl.SSLCertVerificationError as error:
        raise RequestError(Kind.OTHER, f"its certificate is not trusted: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise RequestError(Kind.OTHER, f"it does not speak TLS as expected: {error.reason}") from error
    except (ConnectionRefusedError, socket.gaierror) as error:
        raise RequestError(Kind.UNREACHABLE, error.strerror or str(error)) from error
    except (OSError, http.client.IncompleteRead) as error:
        raise RequestError(Kind.BROKEN, bounds.shown(error) or type(error).__name__) from error
    except http.client.HTTPException as error:
        what = bounds.shown(error) or type(error).__name__
        raise RequestError(Kind.OTHER, f"it does not answer as HTTP has it: {what}") from error

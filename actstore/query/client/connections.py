"""Connections to HTTP servers, kept for the next request, and one request over them."""

import contextlib
import http.client
import os
import socket
import ssl
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError
from actstore.store.storage_errors import Kind, RequestError

_CONNECT_S: Final = 10
_READ_S: Final = 120
"""Without any byte of the reply. A server answers, or says that it is busy, in less."""
_KEPT: Final = 32
"""Idle connections to one server."""

Address = tuple[str, str, int | None]


class Connections:
    """Idle ones by server. Threads may share it; a forked process begins with none."""

    def __init__(self, *, connect_s: float = _CONNECT_S, read_s: float = _READ_S) -> None:
        """
        Args:
            connect_s: seconds to get a connection.
            read_s: seconds without any byte of a reply.
        """
        self._connect_s = connect_s
        self._read_s = read_s
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
        address = (parts.scheme, parts.hostname or "", parts.port)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        with _translated():
            connection, reply = self._sent(address, method, target, headers, body)
        is_done = False
        try:
            with _translated():
                yield reply
            is_done = reply.isclosed() and not reply.will_close
        finally:
            if is_done:
                self._keep(address, connection)
            else:
                connection.close()

    def _sent(
        self, address: Address, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        while True:
            connection = self._taken(address)
            is_new = connection is None
            if connection is None:
                connection = self._opened(address)
            try:
                connection.request(method, target, body, dict(headers))
                return connection, connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                if is_new:
                    raise
                # The server closed it while it was idle; there may be one that it did not.
            except BaseException:
                connection.close()
                raise

    def _taken(self, address: Address) -> http.client.HTTPConnection | None:
        with self._lock:
            idle = self._idle.get(address)
            return idle.pop() if idle else None

    def _opened(self, address: Address) -> http.client.HTTPConnection:
        scheme, host, port = address
        if scheme == "https":
            found: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self._connect_s, context=self._ssl
            )
        else:
            found = http.client.HTTPConnection(host, port, timeout=self._connect_s)
        found.connect()
        found.sock.settimeout(self._read_s)
        return found

    def _keep(self, address: Address, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(address, [])
            if len(idle) < _KEPT:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close those that are idle."""
        with self._lock:
            _close_all(self._idle)


def _close_all(idle: dict[Address, list[http.client.HTTPConnection]]) -> None:
    for connections in idle.values():
        while connections:
            connections.pop().close()


def read_into(reply: http.client.HTTPResponse, out: NDArray[np.uint8]) -> None:
    """The next bytes of a reply, from the socket straight to where they are wanted.

    Args:
        reply: that is read.
        out: contiguous [nbytes].

    Raises:
        RequestError: there are fewer.
    """
    left = out.data
    while left.nbytes:
        n = reply.readinto(left)
        if not n:
            raise RequestError(Kind.BROKEN, "the reply was cut off")
        left = left[n:]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what sockets and http.client raise into `RequestError`."""
    try:
        yield
    except ActstoreError:
        raise  # of the reply; some are an OSError, too
    except ssl.SSLCertVerificationError as error:
        raise RequestError(Kind.OTHER, f"its certificate is not trusted: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise RequestError(Kind.OTHER, f"it does not speak TLS as expected: {error.reason}") from error
    except (ConnectionRefusedError, socket.gaierror) as error:
        raise RequestError(Kind.UNREACHABLE, error.strerror or str(error)) from error
    except http.client.InvalidURL as error:
        raise RequestError(Kind.OTHER, str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(Kind.BROKEN, str(error) or type(error).__name__) from error

"""An HTTP proxy in front of an S3 server that disturbs requests as networks and busy servers do.

Requests pass unchanged, ``Host`` included, so that their signatures stay valid; a plan chooses the faults.
"""

import contextlib
import http.client
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from tests.faults.fault_plan import Fault, Plan, Request

_CHUNK = 1 << 16
_TIMEOUT_S = 60.0
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect", "proxy-connection"}

_ERRORS = {"refuse": (503, "SlowDown"), "break": (500, "InternalError")}
_SLOW_NBYTES_PER_S = 100_000


@dataclass(frozen=True)
class Kill:
    """SIGKILL for a process at one request: before the server gets it, or after it took effect."""

    pid: int
    request: Request
    moment: Literal["before", "after"]


class Throttle:
    """A limit of bytes a second that all bodies share."""

    def __init__(self, nbytes_per_s: float) -> None:
        self.nbytes_per_s = nbytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more bytes may pass."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + nbytes / self.nbytes_per_s
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


@dataclass
class FaultProxy:
    """Settings of a proxy, which may change while it runs, and a record of what it did. Start one with `proxy`."""

    target: str
    """URL of the server: ``http://127.0.0.1:8333``."""
    plan: Plan | None = None
    kill: Kill | None = None
    throttle: Throttle | None = None
    """Limit for bodies of requests and replies."""
    without: tuple[str, ...] = ()
    """Headers that are taken out of requests. The rest is signed anew, for ``admin`` with the password ``secret``."""
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    """How often each fault struck."""
    has_killed: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turns: Counter[tuple[str, str]] = field(default_factory=Counter)

    def came(self, method: str, path: str) -> tuple[Request, Fault | None]:
        """Record a request, and return the fault for it."""
        parts = urlsplit(path)
        key = unquote(parts.path).lstrip("/").split("/", 2)[2:]
        with self._lock:
            name = re.sub("[0-9a-f]{32}", "*", key[0] if key else "?" + parts.query)
            request = Request(method, name, self._turns[method, name])
            self._turns[method, name] += 1
            self.requests.append(request)
            plan = self.plan
        return request, plan(request) if plan else None

    def struck(self, fault: str) -> None:
        with self._lock:
            self.faults[fault] += 1

    def kills(self, request: Request, moment: str) -> bool:
        """Kill the process if this is its request and moment, and return whether it was killed."""
        kill = self.kill
        if kill is None or (kill.request, kill.moment) != (request, moment) or self.has_killed.is_set():
            return False
        os.kill(kill.pid, signal.SIGKILL)
        self.has_killed.set()
        return True

    def forget(self) -> None:
        """Clear the record, and number requests from 0 again."""
        with self._lock:
            self._turns.clear()
            self.requests.clear()
            self.faults.clear()
            self.has_killed.clear()


@contextlib.contextmanager
def proxy(target: str) -> Iterator[FaultProxy]:
    """A proxy on a free port of the loopback interface, until the block ends."""
    state = FaultProxy(target)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="fault-proxy", daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        server.end_connections()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        """Close the connections of clients, each of which keeps one to the server open; it could not stop otherwise."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Report nothing, as clients are killed on purpose."""


class _Handler(BaseHTTPRequestHandler):
    """Handles one connection of a client, with one of its own to the server."""

    state: FaultProxy
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S
    disable_nagle_algorithm = True
    _server: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        if self._server is not None:
            self._server.close()
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        state = self.state
        body = self._body()
        request, fault = state.came(self.command, self.path)
        if fault in _ERRORS:
            state.struck(fault)
            self._error(*_ERRORS[fault])
            return
        if state.kills(request, "before"):
            self._hang_up()
            return
        status, reason, headers, answer = self._forward(body)
        if state.kills(request, "after"):
            self._hang_up()
        elif fault == "lose reply":
            state.struck(fault)
            self._hang_up()
        elif fault == "cut body" and answer:
            state.struck(fault)
            self._reply(status, reason, headers, answer[: len(answer) // 2], None)
            self._hang_up()
        elif fault == "slow body" and answer:
            state.struck(fault)
            self._reply(status, reason, headers, answer, Throttle(_SLOW_NBYTES_PER_S))
        else:
            self._reply(status, reason, headers, answer, state.throttle)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815 - http.server finds them so

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raise NotImplementedError("bodies of unknown length; S3 clients send the length")
        parts, rest = [], int(self.headers.get("Content-Length", 0))
        while rest:
            part = self.rfile.read(min(rest, _CHUNK))
            if not part:
                raise ConnectionError("the client is gone")
            if self.state.throttle:
                self.state.throttle.take(len(part))
            parts.append(part)
            rest -= len(part)
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        dropped = _HOP_BY_HOP | {name.lower() for name in self.state.without}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        if self.state.without:
            headers = _signed(self.command, self.state.target + self.path, headers)
        if self._server is None:
            address = urlsplit(self.state.target)
            assert address.hostname is not None
            self._server = http.client.HTTPConnection(address.hostname, address.port, timeout=_TIMEOUT_S)
            self._server.connect()
            self._server.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            self._server.putheader(name, value)
        self._server.endheaders(body or None)
        reply = self._server.getresponse()
        answer = reply.read()
        if reply.will_close:
            self._server.close()
            self._server = None
        return reply.status, reply.reason, reply.getheaders(), answer

    def _reply(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, pace: Throttle | None
    ) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        # A cut body is announced with its full length, and a reply to HEAD announces what GET would send.
        announced = {name.lower(): value for name, value in headers}.get("content-length", str(len(body)))
        if status not in (204, 304):
            self.send_header("Content-Length", announced)
        self.end_headers()
        for start in range(0, len(body), _CHUNK):
            if pace:
                pace.take(len(body[start : start + _CHUNK]))
            self.wfile.write(body[start : start + _CHUNK])

    def _error(self, status: int, code: str) -> None:
        body = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        )
        self._reply(
            status, code, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else body, None
        )

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def _signed(method: str, url: str, headers: dict[str, str]) -> dict[str, str]:
    """The headers with a signature of the administrator in place of the client's."""
    from botocore.auth import S3SigV4Auth  # type: ignore[import-untyped]
    from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
    from botocore.credentials import Credentials  # type: ignore[import-untyped]

    old = ("authorization", "x-amz-date", "x-amz-content-sha256", "host")
    kept = {name: value for name, value in headers.items() if name.lower() not in old}
    request = AWSRequest(method, url, headers=kept)
    request.context["payload_signing_enabled"] = False
    S3SigV4Auth(Credentials("admin", "secret"), "s3", "us-east-1").add_auth(request)
    return {**dict(request.headers.items()), "Host": urlsplit(url).netloc}

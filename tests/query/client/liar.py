"""A proxy in front of an honest server, which changes replies as a test says."""

import contextlib
import http.client
import json
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    """An honest reply."""

    method: str
    path: str
    """Path below the store, without a query."""
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def head(self) -> bytes:
        """Status line and headers as bytes."""
        lines = [
            f"HTTP/1.1 {self.status} Said",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    @property
    def raw(self) -> bytes:
        """The whole reply as bytes."""
        return self.head + self.body

    def having(self, body: bytes | None = None, /, **headers: str | None) -> "Reply":
        """The reply with another body, and its length, and other headers: ``A_B`` is ``a-b``, None removes a header."""
        changed = dict(self.headers)
        if body is not None:
            changed["content-length"] = str(len(body))
        for name, value in headers.items():
            changed.pop(name.lower().replace("_", "-"), None)
            if value is not None:
                changed[name.lower().replace("_", "-")] = value
        return replace(self, headers=changed, body=self.body if body is None else body)

    def saying(self, change: Callable[[Any], Any]) -> "Reply":
        """The reply with another JSON document; ``change`` edits the document, or returns another one."""
        document = json.loads(self.body)
        changed = change(document)
        return self.having(json.dumps(document if changed is None else changed).encode())


Lie = Callable[[Reply], bytes | Iterable[bytes] | Reply]


@dataclass
class Liar:
    """The URL of a liar, and the lie that it tells."""

    url: str
    lie: Lie | None = None
    paths: list[str] = field(default_factory=list)
    """Paths of the requests that came."""


@contextlib.contextmanager
def lying(honest: str) -> Iterator[Liar]:
    """Run a liar in front of a server, until the end of the block."""
    parts = urlsplit(honest)
    liar = Liar("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

        def _any(self) -> None:
            reply = self._honest()
            liar.paths.append(reply.path)
            changed = reply if liar.lie is None else liar.lie(reply)
            if isinstance(changed, Reply):
                changed = changed.raw
            try:
                for piece in [changed] if isinstance(changed, bytes) else changed:
                    self.wfile.write(piece)
                    self.wfile.flush()
            except OSError:
                self.close_connection = True  # the client hung up early
            if liar.lie is not None:
                self.close_connection = True

        do_GET = do_POST = do_HEAD = _any  # noqa: N815 - named as http.server expects

        def _honest(self) -> Reply:
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            sent = {name: value for name, value in self.headers.items() if name != "Host"}
            connection.request(self.command, self.path, body or None, sent)
            reply = connection.getresponse()
            headers = {name.lower(): value for name, value in reply.getheaders()}
            path = urlsplit(self.path).path.split("/", 4)
            reply_of_server = Reply(
                self.command, "".join(f"/{part}" for part in path[4:]), reply.status, headers, reply.read()
            )
            connection.close()
            return reply_of_server

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        liar.url = f"http://127.0.0.1:{listening.server_address[1]}"
        yield liar
        listening.shutdown()

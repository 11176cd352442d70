"""A proxy in front of any HTTP server: it passes bytes on, counts them, holds them back, or cuts replies."""

import contextlib
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_CHUNK = 1 << 16
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)


@dataclass
class TcpProxy:
    """Settings of a proxy, which may change while it runs, and a record of what it did. Start one with `tcp_proxy`."""

    target: tuple[str, int]
    url: str = ""
    cut_rate: float = 0.0
    """Share of the replies with a body that are cut somewhere in it; the same ones in every run."""
    nbytes: int = 0
    """Bytes that came from the server, with heads."""
    n_cut: int = 0
    seed: int = 0
    flows: threading.Event = field(default_factory=threading.Event)
    """While it is unset, nothing comes from the server."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turns: Counter[bytes] = field(default_factory=Counter)

    def came(self, line: bytes) -> random.Random | None:
        """Count a request, and return the generator that draws where its reply is cut; None if it is not."""
        with self._lock:
            turn = self._turns[line]
            self._turns[line] += 1
        draw = random.Random(f"{self.seed} {line!r} {turn}")
        return draw if draw.random() < self.cut_rate else None

    def passed(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes

    def cut(self) -> None:
        with self._lock:
            self.n_cut += 1


@contextlib.contextmanager
def tcp_proxy(url: str) -> Iterator[TcpProxy]:
    """Run a proxy in front of a server, on a free port of the loopback interface, until the block ends."""
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    proxy = TcpProxy((address.hostname, address.port))
    proxy.flows.set()
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    proxy.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    ends: set[_Connection] = set()
    accepting = threading.Thread(target=_accept, args=(listening, proxy, ends), name="tcp-proxy", daemon=True)
    accepting.start()
    try:
        yield proxy
    finally:
        proxy.flows.set()
        listening.shutdown(socket.SHUT_RDWR)
        accepting.join()
        listening.close()
        for connection in ends:
            connection.end()
        for connection in ends:
            connection.join()


def _accept(listening: socket.socket, proxy: TcpProxy, ends: "set[_Connection]") -> None:
    while True:
        try:
            client, _ = listening.accept()
        except OSError:
            return
        try:
            server = socket.create_connection(proxy.target)
        except OSError:
            client.close()
            continue
        for done in [end for end in ends if end.is_over]:
            done.join()
            ends.discard(done)
        ends.add(_Connection(client, server, proxy))


class _Connection:
    """A connection of a client, and one to the server for it; the client waits for a reply before its next request."""

    def __init__(self, client: socket.socket, server: socket.socket, proxy: TcpProxy) -> None:
        self._client = client
        self._server = server
        self._proxy = proxy
        self._draw: random.Random | None = None
        self._is_answering = True  # so that the first bytes begin a request
        self._threads = [
            threading.Thread(target=self._run, args=(work,), daemon=True)
            for work in (self._requests, self._replies)
        ]
        for thread in self._threads:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread.start()

    @property
    def is_over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, work: object) -> None:
        assert callable(work)
        with contextlib.suppress(OSError):
            work()
        self.end()

    def _requests(self) -> None:
        while data := self._client.recv(_CHUNK):
            if self._is_answering:
                self._is_answering = False
                self._draw = self._proxy.came(data.partition(b"\r\n")[0])
            self._server.sendall(data)

    def _replies(self) -> None:
        while data := self._server.recv(_CHUNK):
            self._proxy.flows.wait()
            self._proxy.passed(len(data))
            draw, is_first = self._draw, not self._is_answering
            self._is_answering = True
            if draw is not None and is_first and self._passes_some(data, draw):
                return
            if draw is None or not is_first:
                self._client.sendall(data)

    def _passes_some(self, data: bytes, draw: random.Random) -> bool:
        """Pass the head of a reply and some of its body. If it has no body, pass all and return False."""
        while b"\r\n\r\n" not in data:
            more = self._server.recv(_CHUNK)
            if not more:
                break
            self._proxy.passed(len(more))
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        if length is None or not body:
            self._client.sendall(data)
            return False
        self._proxy.cut()
        rest = draw.randrange(int(length[1]))
        self._client.sendall(head + b"\r\n\r\n" + body[:rest])
        rest -= len(body[:rest])
        while rest > 0 and (more := self._server.recv(min(rest, _CHUNK))):
            self._proxy.passed(len(more))
            self._client.sendall(more)
            rest -= len(more)
        return True

    def end(self) -> None:
        """Hang up on both sides."""
        for side in (self._client, self._server):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._client.close()
        self._server.close()

"""Objects that are read by presigned URLs of a server, from storage that may misbehave."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final

import numpy as np
import pytest

from actstore.errors import StorageError
from actstore.query.client.direct import SignedBlobs
from actstore.query.client.server import Server

DATA = bytes(range(100))


class Storage(BaseHTTPRequestHandler):
    """A server with one store, and the storage behind it, which reports for a while that the object has changed."""

    lie: ClassVar[Callable[[bytes], bytes] | None] = None
    """What the storage sends in the place of the object's bytes."""
    refusals: ClassVar[list[str | None]] = []
    """``If-Match`` of the refused requests."""

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = f"http://{self.headers['Host']}/signed"
        places = [{"key": key, "url": url, "kind": "http"} for key in asked["keys"]]
        plan = {"expires_s": 900, "places": places, "arrays": [], "reads": []}
        self._reply(200, json.dumps(plan).encode())

    def do_GET(self) -> None:
        if Storage.lie is not None:
            self.wfile.write(Storage.lie(DATA[20:30]))
            self.close_connection = True
            return
        if len(self.refusals) < 2:
            self.refusals.append(self.headers["If-Match"])
            self._reply(412, b"")
            return
        start, stop = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self._reply(206, DATA[start : stop + 1])


@pytest.fixture
def server() -> Iterator[Server]:
    Storage.refusals, Storage.lie = [], None
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Server(f"http://127.0.0.1:{listening.server_port}/v1/stores/one", None)
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_storage_that_says_twice_that_an_object_has_changed(server: Server) -> None:
    """A cache in between may go on reporting a change when the client no longer sends an ETag."""
    out = np.zeros(10, np.uint8)
    SignedBlobs(server)._read_into("acts/a/c.0.0", 20, out, '"old"')
    assert out.tobytes() == DATA[20:30]
    assert Storage.refusals == ['"old"', None]


def lie_with_head(head: str) -> Callable[[bytes], bytes]:
    """A lie with these lines as its head, and then the bytes."""
    lines = head.replace("\n", "\r\n")
    return lambda data: f"HTTP/1.1 {lines}\r\n\r\n".encode() + data


LIES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "no length": lie_with_head("206 Said"),
    "another length": lie_with_head("206 Said\nContent-Length: 11"),
    "a negative length": lie_with_head("206 Said\nContent-Length: -10"),
    "less": lie_with_head("206 Said\nContent-Length: 9"),
    "all of it": lie_with_head("200 Said\nContent-Length: 100"),
    "chunks": lie_with_head("206 Said\nTransfer-Encoding: chunked\n\nffffffff"),
    "another range": lie_with_head("206 Said\nContent-Length: 10\nContent-Range: bytes 0-9/100"),
    "elsewhere": lie_with_head("307 Said\nLocation: http://127.0.0.1:1/\nContent-Length: 0"),
    "no content": lie_with_head("204 Said"),
    "no HTTP": lambda _: b"220 ftp.example.org\r\n" * 3,
}


@pytest.mark.parametrize("kind", LIES)
def test_storage_that_lies(kind: str, server: Server) -> None:
    """The lie is refused in one sentence, which names the object and not its signature."""
    Storage.lie = LIES[kind]
    with pytest.raises(StorageError) as caught:
        SignedBlobs(server).read("acts/a/c.0.0", 20, 10)
    assert "acts/a/c.0.0" in str(caught.value)
    assert "/signed" not in str(caught.value)
    assert len(str(caught.value)) < 500

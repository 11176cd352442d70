"""Malformed requests: the server answers with a problem, reveals nothing, and goes on."""

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
import pytest

from actstore.query.problem import TITLES
from actstore.query.wire import ARROW, JSON, NPY, PROBLEM, RAW, SAFETENSORS
from tests.query.running import Running, running
from tests.query.stores import GROWN, WHOLE
from tests.store.example import HOOKS

pytestmark = pytest.mark.xdist_group("fuzz")

_SECRET: Final = b"The eagle lands at midnight"
_TIMEOUT_S: Final = 30.0
_FILES: Final = 12
"""Open file descriptors that a server may have more of at the end; mostly connections that are kept."""
_HOOK: Final = HOOKS[0]
_STORE: Final = f"/v1/stores/{WHOLE}"
_SLICE: Final = f"{_STORE}/hooks/{_HOOK}/slice"
_PLAN: Final = f"{_STORE}/zarr/_actstore/runs/0000/plan.json"


@dataclass(frozen=True)
class Reply:
    """All that came until the server closed the connection."""

    status: int
    headers: dict[str, str]
    """Headers by name in lower case."""
    body: bytes


@dataclass(frozen=True)
class Target:
    """A server with secrets around its stores."""

    running: Running
    folder: Path

    def connect(self) -> socket.socket:
        parts = urlsplit(self.running.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return socket.create_connection((parts.hostname, parts.port), _TIMEOUT_S)

    def send(self, data: bytes) -> bytes:
        """Send some bytes, and return all that comes back."""
        with self.connect() as connection:
            # The server may close the connection before all is sent.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            received = bytearray()
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(1 << 16):
                    received += piece
        return bytes(received)

    def ask(
        self, target: str | bytes, *headers: str | bytes, method: str = "GET", body: bytes | None = None
    ) -> Reply:
        """Send one request, and check its reply as `checked` does."""
        lines = [
            method.encode() + b" " + _bytes(target) + b" HTTP/1.1",
            b"Host: localhost",
            b"Connection: close",
        ]
        lines += map(_bytes, headers)
        if body is not None:
            lines += [b"Content-Length: %d" % len(body)]
        return checked(self.send(b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")), method)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def checked(data: bytes, method: str = "GET") -> Reply:
    """Parse a reply, and check that it is no server error, has no secret, and is a problem if it is an error."""
    assert _SECRET not in data
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(first.split()[1])
    assert 200 <= status < 500, data[:500]
    assert "x-injected" not in headers
    if method != "HEAD":
        assert len(body) == int(headers.get("content-length", 0)), data[:500]
    if status >= 400:
        assert headers["content-type"] == PROBLEM, data[:500]
        if method != "HEAD":
            _check_problem(json.loads(body), status)
    return Reply(status, headers, body)


def _check_problem(document: Any, status: int) -> None:
    """Check that a document is a problem as RFC 9457 defines it."""
    assert document.keys() == {"type", "title", "status", "detail"}
    assert document["status"] == status
    kind = document["type"].removeprefix("urn:actstore:problem:")
    assert document["title"] == TITLES[kind]
    assert document["detail"]
    assert "Traceback" not in document["detail"]


@pytest.fixture(scope="module")
def target(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The server must answer at the end, and have closed what it opened."""
    folder = tmp_path_factory.mktemp("fuzz")
    root = folder / "root"
    shutil.copytree(stores, root)
    store = root / WHOLE
    (root / "no-store").mkdir()
    for place in (
        folder / "secret",
        folder / "zarr.json",
        root / "secret",
        root / "zarr.json",
        root / "no-store" / "zarr.json",
        store / "secret",
        store / "secret.json",
        store / "_actstore" / "partial" / "secret",
        store / "_actstore" / "runs" / "0000" / "secret.json",
        store / "acts" / _HOOK / "secret",
        store / "acts" / _HOOK / "c.0.0.0.partial",
    ):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(_SECRET)
    (store / "acts" / "out").symlink_to(folder)
    with running(folder, "--root", str(root)) as server:
        target = Target(server, folder)
        process = psutil.Process(server.process.pid)
        for path in (_SLICE, _PLAN, f"{_STORE}/batches/0?hook={_HOOK}&batch_size=8", "/v1/stores"):
            assert target.ask(path).status == 200
        n_files = process.num_fds()
        yield target
        assert target.ask(_SLICE).status == 200
        _wait_for_files(process, n_files + _FILES)


def _wait_for_files(process: psutil.Process, most: int) -> None:
    end = time.monotonic() + 20
    while (n := process.num_fds()) > most:
        assert time.monotonic() < end, f"{n} files are open, {most} were expected at most"
        time.sleep(0.2)


NAMES: Final[dict[str, bytes]] = {
    "nothing": b"",
    "dot": b".",
    "dots": b"..",
    "encoded dots": b"%2e%2e",
    "one encoded dot": b".%2e",
    "dots encoded twice": b"%252e%252e",
    "dots with fullwidth": b"%ef%bc%8e%ef%bc%8e",
    "up": b"../secret",
    "up, slash encoded": b"..%2fsecret",
    "up, slash encoded twice": b"..%252fsecret",
    "up, all encoded": b"%2e%2e%2f%73%65%63%72%65%74",
    "up twice": b"%2e%2e/%2e%2e/secret",
    "up to a document": b"../zarr.json",
    "up to a document, encoded": b"%2e%2e%2fzarr.json",
    "up and down": f"../{GROWN}/zarr.json".encode(),
    "up in the middle": f"acts/../../{GROWN}/zarr.json".encode(),
    "far up": b"../" * 500 + b"etc/passwd",
    "backslash": b"..\\secret",
    "backslash encoded": b"..%5csecret",
    "absolute": b"/etc/passwd",
    "absolute encoded": b"%2fetc%2fpasswd",
    "two slashes": b"//etc/passwd",
    "many slashes": b"/" * 2000,
    "a file URL": b"file:///etc/passwd",
    "an S3 URL": b"s3://bucket/key",
    "through a link": b"acts/out/secret",
    "beside": b"secret",
    "a document beside": b"secret.json",
    "a folder that is no store": b"no-store",
    "partial": b"_actstore/partial/secret",
    "partial encoded": b"_actstore%2fpartial%2fsecret",
    "beside the records": b"_actstore/runs/0000/secret.json",
    "beside the shards": f"acts/{_HOOK}/secret".encode(),
    "a shard not whole": f"acts/{_HOOK}/c.0.0.0.partial".encode(),
    "a shard with zeros": f"acts/{_HOOK}/c.00.0.0".encode(),
    "a shard far away": f"acts/{_HOOK}/c.999999999999999999.0.0".encode(),
    "a run that is none": b"_actstore/runs/9999/plan.json",
    "a folder": b"acts/",
    "a store's own name": WHOLE.encode(),
    "a document": b"zarr.json",
    "a document behind NUL": b"zarr.json%00",
    "a document before NUL": b"%00zarr.json",
    "a secret before NUL": b"secret%00zarr.json",
    "a document with parameters": b"zarr.json;v=1",
    "a document with a newline": b"zarr.json%0a",
    "NUL": b"%00",
    "bad escape": b"%zz",
    "short escape": b"%2",
    "percent": b"%",
    "overlong dots": b"%c0%ae%c0%ae%c0%afsecret",
    "overlong, three bytes": b"%e0%80%ae%e0%80%ae/secret",
    "half a character": b"%c3",
    "no UTF-8": b"%ff%fe%80",
    "surrogate": b"%ed%a0%80",
    "beyond Unicode": b"%f7%bf%bf%bf",
    "raw bytes": b"\xff\xfe",
    "raw UTF-8": "é".encode(),
    "right to left": b"%E2%80%AEsecret",
    "emoji": b"%F0%9F%A6%80",
    "semicolon": b";a=b",
    "hash": b"%23",
    "question mark": b"%3f",
    "ampersand": b"%26seq=0",
    "plus": b"+",
    "space": b"%20",
    "tab": b"%09",
    "header injection": b"%0d%0aX-Injected:%201",
    "long": b"a" * 5000,
    "longer than a URL": b"a" * 70_000,
    "a huge number": b"9" * 400,
    "many numbers": b"0," * 20_000 + b"0",
    "64 bits and more": b"18446744073709551616",
    "minus one": b"-1",
    "minus zero": b"-0",
    "a float": b"1e999",
    "NaN": b"nan",
    "hexadecimal": b"0x10",
    "arabic digits": b"%D9%A1",
    "superscript": b"%c2%b2",
    "underscores": b"1_000",
    "step zero": b"::0",
    "huge slice": b"-999999999999999999:999999999999999999:999999999999999999",
    "backwards": b"::-1",
    "glob": b"*",
    "open bracket": b"%5B",
    "open range": b"%5Ba-",
    "slow glob": b"*a" * 90 + b"*b",
    "slow pattern": b"(a%2B)%2B%24",
    "template": b"%7B%7B7*7%7D%7D",
    "markup": b"%3Cscript%3E",
    "quotes": b"%22%27",
    "format": b"%25s%25n%7B0%7D",
}
"""Requests that are sent as they are."""

PLACES: Final[dict[str, tuple[str, bytes]]] = {
    "path": ("GET", b"/%s"),
    "store": ("GET", b"/v1/stores/%s"),
    "hooks of a store": ("GET", b"/v1/stores/%s/hooks"),
    "slice of a store": ("GET", f"/v1/stores/%s/hooks/{_HOOK}/slice".encode()),
    "zarr of a store": ("GET", b"/v1/stores/%s/zarr/zarr.json"),
    "hook": ("GET", f"{_STORE}/hooks/%s/slice".encode()),
    "statistics": ("GET", f"{_STORE}/hooks/%s/stats".encode()),
    "key": ("GET", f"{_STORE}/zarr/%s".encode()),
    "key of a head": ("HEAD", f"{_STORE}/zarr/%s".encode()),
    "key below arrays": ("GET", f"{_STORE}/zarr/acts/%s".encode()),
    "key below an array": ("GET", f"{_STORE}/zarr/acts/{_HOOK}/%s".encode()),
    "key below records": ("GET", f"{_STORE}/zarr/_actstore/runs/%s/plan.json".encode()),
    "sequences": ("GET", f"{_SLICE}?seq=%s".encode()),
    "positions": ("GET", f"{_SLICE}?pos=%s".encode()),
    "elements": ("GET", f"{_SLICE}?inner=%s".encode()),
    "format": ("GET", f"{_SLICE}?format=%s".encode()),
    "unknown": ("GET", f"{_SLICE}?unknown=%s".encode()),
    "key of a query": ("GET", f"{_SLICE}?%s=1".encode()),
    "batch": ("GET", f"{_STORE}/batches/%s?hook={_HOOK}&batch_size=8".encode()),
    "hook of batches": ("GET", f"{_STORE}/batches?batch_size=8&hook=%s".encode()),
    "size of batches": ("GET", f"{_STORE}/batches?hook={_HOOK}&batch_size=%s".encode()),
    "seed": ("GET", f"{_STORE}/batches?hook={_HOOK}&batch_size=8&seed=%s".encode()),
    "positions of batches": ("GET", f"{_STORE}/batches?hook={_HOOK}&batch_size=8&seqpos=%s".encode()),
    "tokens to drop": ("GET", f"{_STORE}/batches?hook={_HOOK}&batch_size=8&drop=%s".encode()),
    "largest norm": ("GET", f"{_STORE}/batches/0?hook={_HOOK}&batch_size=8&max_norm=%s".encode()),
    "window": ("GET", f"{_STORE}/batches/0?hook={_HOOK}&batch_size=8&shuffle=window&window_rows=%s".encode()),
    "epoch": ("GET", f"{_STORE}/batches/0?hook={_HOOK}&batch_size=8&epoch=%s".encode()),
    "tokens": ("GET", f"{_STORE}/prompts?tokens=%s".encode()),
    "text": ("GET", f"{_STORE}/prompts?text=%s".encode()),
    "hash": ("GET", f"{_STORE}/prompts?sha=%s".encode()),
    "limit": ("GET", f"{_STORE}/prompts?tokens=1&limit=%s".encode()),
    "twice": ("GET", f"{_SLICE}?seq=0&seq=%s&pos=0".encode()),
}
"""Texts in different places of a URL."""


@pytest.mark.parametrize("place", PLACES)
def test_names(place: str, target: Target) -> None:
    method, where = PLACES[place]
    names = NAMES | {
        "where the secret is": f"{target.folder}/secret".encode(),
        "where the secret is, encoded": f"{target.folder}/secret".replace("/", "%2f").encode(),
    }
    for name, value in names.items():
        try:
            target.ask(where % value, method=method)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


TEXTS: Final[dict[str, str]] = {
    "dots": "..",
    "up": "../secret",
    "absolute": "/etc/passwd",
    "partial": "_actstore/partial/secret",
    "backslash": "..\\secret",
    "NUL": "zarr.json\0",
    "surrogate": "\ud800",
    "half a pair": "zarr\udfff.json",
    "emoji": "🦀",
    "long": "a" * 1000,
    "too long": "a" * 10_000,
    "slow glob": "*a" * 90 + "*b",
    "open bracket": "[",
    "nothing": "",
    "newline": "a\r\nX-Injected: 1",
    "a number": "9" * 4000,
    "step zero": "::0",
}
"""JSON strings."""


@pytest.mark.parametrize("name", TEXTS)
def test_texts_in_bodies(name: str, target: Target) -> None:
    text = TEXTS[name]
    documents: list[tuple[str, Any]] = [
        ("plan", {"keys": [text]}),
        ("plan", {"keys": ["zarr.json", text]}),
        ("plan", {"select": {"hooks": [text]}}),
        ("plan", {text: [text]}),
        ("select", {"hooks": [text]}),
        ("select", {"hooks": [_HOOK], "sequences": text}),
        ("select", {"hooks": [_HOOK], "positions": text}),
        ("select", {"hooks": [_HOOK], "inner": text}),
        ("select", {"hooks": [_HOOK], "slots": text}),
        ("select", {"hooks": [_HOOK], text: 1}),
        ("rows", {"hook": text, "sequences": [], "entries": []}),
        ("rows", {"hook": _HOOK, "sequences": [0], "entries": text}),
    ]
    for resource, document in documents:
        body = json.dumps(document).encode()
        reply = target.ask(f"{_STORE}/{resource}", f"Content-Type: {JSON}", method="POST", body=body)
        assert reply.status in (404, 422), document


def _select(**fields: Any) -> bytes:
    return json.dumps({"hooks": [_HOOK], **fields}).encode()


BODIES: Final[dict[str, bytes]] = {
    "nothing": b"",
    "half": b'{"hooks": [',
    "text": b"hooks",
    "null": b"null",
    "true": b"true",
    "a number": b"7",
    "a string": b'"hooks"',
    "a list": b"[]",
    "an object": b"{}",
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"hooks":' * 50_000,
    "lists in a field": b'{"hooks": ' + b"[" * 500 + b"]" * 500 + b"}",
    "NaN": b'{"hooks": ["x"], "sequences": [NaN]}',
    "infinity": b'{"hooks": ["x"], "sequences": [-Infinity]}',
    "too large a float": b'{"hooks": ["x"], "sequences": [1e999]}',
    "half a number": _select(sequences=[1.5]),
    "64 bits": _select(sequences=[2**64]),
    "48 bits and more": _select(positions=[2**48 + 1]),
    "a huge number": b'{"hooks": ["x"], "sequences": [' + b"9" * 4000 + b"]}",
    "a number too long to read": b'{"hooks": ["x"], "sequences": [' + b"9" * 5000 + b"]}",
    "out of bounds": _select(sequences=[37]),
    "a word for a number": _select(sequences=["one"]),
    "an object for numbers": _select(sequences={"start": 0}),
    "null for numbers": _select(sequences=None),
    "too many numbers": _select(sequences=[0] * 100_001),
    "too many hooks": json.dumps({"hooks": ["tokens"] * 1001}).encode(),
    "too many axes": _select(inner="0,0,0"),
    "unknown field": _select(rows=[1]),
    "no UTF-8": b'{"hooks": ["\xff"]}',
    "UTF-8 cut off": b'{"hooks": ["\xc3',
    "UTF-16 with other letters": json.dumps({"hooks": ["é"]}).encode("utf-16"),
    "a comment": b'{"hooks": [] /* none */}',
    "a comma too many": b'{"hooks": ["x"],}',
    "NUL": b"\0" * 100,
    "zip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03",
}
"""Documents that are no selection of this store."""


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str, target: Target) -> None:
    for resource in ("select", "plan", "rows"):
        reply = target.ask(f"{_STORE}/{resource}", f"Content-Type: {JSON}", method="POST", body=BODIES[name])
        assert reply.status in (404, 413, 422)


@pytest.mark.parametrize(
    "media",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "a/b/c",
        "\xff",
        "x" * 9000,
    ],
    ids=lambda media: str(media)[:40],
)
def test_bodies_of_other_types(media: str | None, target: Target) -> None:
    headers = [] if media is None else [b"Content-Type: " + media.encode("latin-1")]
    assert target.ask(f"{_STORE}/select", *headers, method="POST", body=_select()).status in (400, 422)


@pytest.mark.parametrize(
    "media", [JSON, "Application/JSON", f"{JSON}; charset=utf-8", f"{JSON};;", "application/vnd.x+json"]
)
def test_bodies_of_json_types(media: str, target: Target) -> None:
    reply = target.ask(f"{_STORE}/select", f"Content-Type: {media}", method="POST", body=_select())
    assert reply.status == 200
    assert reply.headers["content-type"] == SAFETENSORS


def test_bodies_too_large(target: Target) -> None:
    announced = b"POST %s/select HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" % _STORE.encode()
    announced += b"Content-Type: application/json\r\n"
    assert checked(target.send(announced + b"Content-Length: 4194305\r\n\r\n{")).status == 413
    assert checked(target.send(announced + b"Content-Length: 99999999999999999999\r\n\r\n{")).status in (
        400,
        413,
    )
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    chunked = announced + b"Transfer-Encoding: chunked\r\n\r\n"
    assert checked(target.send(chunked + piece * 80)).status == 413
    assert checked(target.send(chunked + b"2\r\n{}\r\n0\r\n\r\n")).status == 422
    assert checked(target.send(chunked + b"zz\r\n{}\r\n0\r\n\r\n")).status == 400


RANGES: Final[dict[str, slice | int]] = {
    "bytes=0-0": slice(0, 1),
    "bytes=0-9": slice(0, 10),
    "bytes=3-": slice(3, None),
    "bytes=-7": slice(-7, None),
    "bytes=0-99999999": slice(None),
    "bytes=-99999999": slice(None),
    "bytes=5-999999999999999999": slice(5, None),
    "bytes=00000-00004": slice(0, 5),
    "bytes=-0": 416,
    "bytes=9-3": 416,
    "bytes=99999999-": 416,
    "bytes=99999999-999999999": 416,
    "bytes=999999999999999999-999999999999999999": 416,
    # A header that is not exactly one range is ignored.
    "bytes=0-1,4-5": 200,
    "bytes=0-1,0-1" + ",0-1" * 500: 200,
    "bytes=-5,0-1": 200,
    "bytes=": 200,
    "bytes=-": 200,
    "bytes=--5": 200,
    "bytes=0--5": 200,
    "bytes=a-b": 200,
    "bytes=0-1-2": 200,
    "bytes=1.5-2": 200,
    "bytes=0x0-0xf": 200,
    "bytes= 0-1": 200,
    "bytes 0-1": 200,
    "bytes=" + "9" * 5000 + "-": 200,
    "lines=0-1": 200,
    "0-1": 200,
    "": 200,
    "bytes=²-³": 200,
    "bytes=\u0661-\u0662": 200,
}
"""Ranges, and the part of the bytes that is sent, or a status."""


@pytest.mark.parametrize("path", [_PLAN, _SLICE, f"{_SLICE}?format=npy", f"{_SLICE}?seq=0,5,9&pos=1"])
def test_ranges(path: str, target: Target) -> None:
    whole = target.ask(path).body
    for text, expected in RANGES.items():
        reply = target.ask(path, f"Range: {text}")
        if expected == 416:
            assert (reply.status, reply.headers["content-range"]) == (416, f"bytes */{len(whole)}"), text
        elif expected == 200:
            assert (reply.status, reply.body) == (200, whole), text
        else:
            assert isinstance(expected, slice)
            start, stop, _ = expected.indices(len(whole))
            assert (reply.status, reply.body) == (206, whole[start:stop]), text
            assert reply.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}", text


def test_ranges_of_nothing(target: Target) -> None:
    for path in (f"{_SLICE}?seq=0:0", f"{_SLICE}?pos=3:3"):
        assert target.ask(path).body == b""
        for text in ("bytes=0-", "bytes=0-0", "bytes=-1", "bytes=-0"):
            reply = target.ask(path, f"Range: {text}")
            assert (reply.status, reply.headers["content-range"]) == (416, "bytes */0"), text


def test_ranges_are_for_get_alone(target: Target) -> None:
    whole = target.ask(_PLAN)
    head = target.ask(_PLAN, "Range: bytes=0-9", method="HEAD")
    assert (head.status, head.headers["content-length"]) == (200, str(len(whole.body)))
    asked = (f"Content-Type: {JSON}", f"Accept: {RAW}")
    selected = target.ask(f"{_STORE}/select", *asked, "Range: bytes=0-9", method="POST", body=_select())
    assert (selected.status, selected.body) == (200, target.ask(_SLICE).body)


@pytest.mark.parametrize("path", [_PLAN, _SLICE, f"{_SLICE}?seq=3&format=safetensors"])
def test_conditions(path: str, target: Target) -> None:
    whole = target.ask(path)
    tag = whole.headers["etag"]
    for known in (tag, f"W/{tag}", f'"x", {tag}', f'"x",W/{tag} ', "*"):
        reply = target.ask(path, f"If-None-Match: {known}")
        assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", tag), known
        reply = target.ask(path, f"If-None-Match: {known}", "Range: bytes=0-1")
        assert (reply.status, reply.body) == (304, b""), known
    for unknown in ('"x"', "", ",", tag[1:-1], f"{tag}x", '"' * 5000, "\xff", "**", "W/"):
        reply = target.ask(path, b"If-None-Match: " + unknown.encode("latin-1"))
        assert (reply.status, reply.body) == (200, whole.body), unknown
    assert target.ask(path, f"If-Range: {tag}", "Range: bytes=2-3").body == whole.body[2:4]
    for other in ('"x"', f"W/{tag}", "*", "", "Wed, 21 Oct 2015 07:28:00 GMT", f"{tag}, {tag}", "\xff"):
        reply = target.ask(path, b"If-Range: " + other.encode("latin-1"), "Range: bytes=2-3")
        assert (reply.status, reply.body) == (200, whole.body), other


def test_an_unfinished_store_has_no_tags(target: Target) -> None:
    path = f"/v1/stores/{GROWN}/hooks/{_HOOK}/slice?seq=0:4"
    whole = target.ask(path)
    assert "etag" not in whole.headers
    assert target.ask(path, "If-None-Match: *").body == whole.body
    assert target.ask(path, 'If-Range: "x"', "Range: bytes=0-1").body == whole.body


ACCEPTED: Final[dict[str, str | int]] = {
    "*/*": RAW,
    "application/*": RAW,
    "": RAW,
    NPY: NPY,
    NPY.upper(): NPY,
    f"{NPY};q=0.5, {ARROW};q=0.9": ARROW,
    f"{NPY};q=0.5;x=y, {JSON};level=1;q=0.9": JSON,
    f"{SAFETENSORS};q=0, */*;q=0.1": RAW,
    f"{RAW};q=0, */*;q=0.1": SAFETENSORS,
    f"*/*, {RAW};q=0": SAFETENSORS,
    f"{RAW};q=0.1, {NPY};q=0.2, */*;q=0.3": SAFETENSORS,
    f"application/*;q=0, {NPY}, */*": NPY,
    "application/*;q=0, */*": 406,
    "*/*;q=0": 406,
    f"{SAFETENSORS};q=0": 406,
    f"text/html, {SAFETENSORS}": SAFETENSORS,
    f"{NPY};q=x": NPY,
    f"{NPY};q=": NPY,
    f"{NPY};q=1e999": NPY,
    f"{NPY};q=nan": 406,
    f"{NPY};q=-1": 406,
    f"{NPY};;;": NPY,
    f",,{NPY},,": NPY,
    "text/html": 406,
    "image/*": 406,
    "*": 406,
    "*/json": 406,
    "garbage": 406,
    ";": 406,
    ";q=1": 406,
    "q=1": 406,
    "application": 406,
    "a/b," * 2000: 406,
}
"""Type of the reply, or its status."""


def test_accepted(target: Target) -> None:
    for text, expected in ACCEPTED.items():
        reply = target.ask(f"{_SLICE}?seq=0", f"Accept: {text}")
        outcome = reply.headers["content-type"] if reply.status == 200 else reply.status
        assert outcome == expected, text
    for text in ("\xff\xfe", "\t", "a" * 30_000, "%00"):
        assert target.ask(f"{_SLICE}?seq=0", b"Accept: " + text.encode("latin-1")).status in (200, 406)
        path = f"{_STORE}/batches/0?hook={_HOOK}&batch_size=8"
        assert target.ask(path, b"Accept: " + text.encode("latin-1")).status == 200


BATCHES_ACCEPTED: Final[dict[str, tuple[str | int, str | int]]] = {
    "*/*": (RAW, SAFETENSORS),
    "application/*": (RAW, SAFETENSORS),
    RAW: (RAW, 406),
    RAW.upper(): (RAW, 406),
    SAFETENSORS: (SAFETENSORS, SAFETENSORS),
    SAFETENSORS.upper(): (SAFETENSORS, SAFETENSORS),
    f"{RAW}, {SAFETENSORS}": (RAW, SAFETENSORS),
    f"{RAW};q=0.5, {SAFETENSORS}": (SAFETENSORS, SAFETENSORS),
    f"{RAW}, {SAFETENSORS};q=0.5": (RAW, SAFETENSORS),
    f"{RAW}, */*;q=0.1": (RAW, SAFETENSORS),
    f"{RAW};q=0, */*": (SAFETENSORS, SAFETENSORS),
    f"{SAFETENSORS};q=0, */*": (RAW, 406),
    f"{RAW};q=0": (406, 406),
    f"{SAFETENSORS};q=0": (406, 406),
    "*/*;q=0": (406, 406),
    f"{RAW}x": (RAW, SAFETENSORS),
    f"{SAFETENSORS}x": (RAW, SAFETENSORS),
    "text/html": (RAW, SAFETENSORS),
}
"""Types of a batch of one hook and of one with provenance, or the status. What names neither type is ignored."""


def test_accepted_batches(target: Target) -> None:
    path = f"{_STORE}/batches/0?hook={_HOOK}&batch_size=8"
    for text, expected in BATCHES_ACCEPTED.items():
        replies = [target.ask(f"{path}{more}", f"Accept: {text}") for more in ("", "&provenance=1")]
        outcome = tuple(
            reply.headers["content-type"] if reply.status == 200 else reply.status for reply in replies
        )
        assert outcome == expected, text


SELECTED: Final = {
    "*/*": SAFETENSORS,
    "application/*": SAFETENSORS,
    "text/html": SAFETENSORS,
    SAFETENSORS: SAFETENSORS,
    RAW: RAW,
    RAW.upper(): RAW,
    f"{RAW};q=0.9": RAW,
    f"{RAW}, */*;q=0.1": RAW,
    f"{RAW}, {SAFETENSORS}": RAW,
    f"{RAW};q=0.1, {SAFETENSORS}": SAFETENSORS,
    f"{RAW};q=0": SAFETENSORS,
}
"""Type of the selection from one hook. What allows neither type is ignored."""


def test_accepted_selections(target: Target) -> None:
    for text, expected in SELECTED.items():
        head = (f"Content-Type: {JSON}", f"Accept: {text}")
        reply = target.ask(f"{_STORE}/select", *head, method="POST", body=_select())
        assert (reply.status, reply.headers["content-type"]) == (200, expected), text


_END: Final = b"\r\nConnection: close\r\n\r\n"
_GET: Final = b"GET /healthz HTTP/1.1\r\nHost: localhost"

PROTOCOLS: Final[dict[str, tuple[bytes, set[int]]]] = {
    "HTTP/1.0": (b"GET /healthz HTTP/1.0\r\n\r\n", {200}),
    "HTTP/1.0 of a slice": (f"GET {_SLICE} HTTP/1.0\r\n\r\n".encode(), {200}),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", {200, 400}),
    "HTTP/9.9": (b"GET /healthz HTTP/9.9\r\nHost: localhost" + _END, {200, 400}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404, 405}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), {400}),
    "binary": (bytes(range(256)) * 4 + b"\r\n\r\n", {400}),
    "no method": (b" /healthz HTTP/1.1\r\n\r\n", {400}),
    "no URL": (b"GET  HTTP/1.1\r\n\r\n", {400}),
    "no host": (b"GET /healthz HTTP/1.1" + _END, {200, 400}),
    "two hosts": (_GET + b"\r\nHost: y" + _END, {200, 400}),
    "a strange host": (b"GET /healthz HTTP/1.1\r\nHost: ../../etc\xff" + _END, {200, 400}),
    "a whole URL": (b"GET http://elsewhere/healthz HTTP/1.1\r\nHost: localhost" + _END, {200, 400, 404}),
    "another method": (b"DELETE /healthz HTTP/1.1\r\nHost: localhost" + _END, {405}),
    "PUT": (f"PUT {_PLAN} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0".encode() + _END, {405}),
    "DELETE": (f"DELETE {_STORE} HTTP/1.1\r\nHost: localhost".encode() + _END, {405}),
    "unknown method": (b"FETCH /healthz HTTP/1.1\r\nHost: localhost" + _END, {400, 405}),
    "method in lower case": (b"get /healthz HTTP/1.1\r\nHost: localhost" + _END, {400, 405}),
    "a long method": (b"G" * 70_000 + b" / HTTP/1.1\r\nHost: localhost" + _END, {400, 405}),
    "TRACE": (b"TRACE /healthz HTTP/1.1\r\nHost: localhost" + _END, {400, 405}),
    "OPTIONS": (b"OPTIONS * HTTP/1.1\r\nHost: localhost" + _END, {400, 404, 405}),
    "CONNECT": (b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: localhost" + _END, {400, 404, 405}),
    "WebSocket": (
        _GET
        + b"\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
        b"\r\nConnection: upgrade, close\r\n\r\n",
        {200, 400},
    ),
    "two lengths": (_GET + b"\r\nContent-Length: 1\r\nContent-Length: 2" + _END, {400}),
    "a negative length": (_GET + b"\r\nContent-Length: -1" + _END, {400}),
    "a length in words": (_GET + b"\r\nContent-Length: two" + _END, {400}),
    "a length in other digits": (_GET + b"\r\nContent-Length: \xb2" + _END, {400}),
    "length and chunks": (
        _GET + b"\r\nContent-Length: 5\r\nTransfer-Encoding: chunked" + _END + b"0\r\n\r\n",
        {200, 400},
    ),
    "unknown coding": (_GET + b"\r\nTransfer-Encoding: gzip" + _END, {200, 400}),
    "no colon": (_GET + b"\r\nno colon here" + _END, {400}),
    "NUL in a header": (_GET + b"\r\nX: a\0b" + _END, {400}),
    "a folded header": (_GET + b"\r\nX: a\r\n b" + _END, {200, 400}),
    "a header without a name": (_GET + b"\r\n: a" + _END, {400}),
    "many headers": (_GET + b"".join(b"\r\nX-%d: y" % n for n in range(5000)) + _END, {200, 400, 431}),
    "a large header": (_GET + b"\r\nX: " + b"y" * 500_000 + _END, {200, 400, 431}),
    "100-continue": (
        f"POST {_STORE}/select HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nExpect: other".encode()
        + b"\r\nContent-Length: 2"
        + _END
        + b"{}",
        {417, 422},
    ),
}
"""Requests, and the allowed answers."""


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols(name: str, target: Target) -> None:
    data, expected = PROTOCOLS[name]
    assert checked(target.send(data)).status in expected


def test_several_requests_at_once(target: Target) -> None:
    data = target.send((_GET + b"\r\n\r\n") * 20 + _GET + _END)
    assert data.count(b"HTTP/1.1 200 OK") == 21


_HALF: Final = (
    b"G",
    b"GET ",
    b"GET /v1/stores",
    b"GET /v1/stores HTTP/1.1\r\n",
    b"GET /v1/stores HTTP/1.1\r\nHost: localhost\r\nX: ",
    f"GET {_SLICE} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    f"POST {_STORE}/select HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {JSON}\r\nContent-Length: 90\r\n\r\n{{".encode(),
    f"POST {_STORE}/plan HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{{".encode(),
    f"GET {_STORE}/batches/0?hook={_HOOK}&batch_size=99 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    b"",
)


def test_half_requests(target: Target) -> None:
    for data in _HALF * 20:
        with target.connect() as connection:
            connection.sendall(data)
    for data in _HALF:
        with target.connect() as connection:
            connection.sendall(data)
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )  # the connection ends with a reset
    assert target.ask("/healthz").status == 200
    assert "Traceback" not in target.running.log.read_text()


def test_who_only_waits_keeps_nobody_waiting(target: Target) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(100):
            connection = stack.enter_context(target.connect())
            connection.sendall(_HALF[n % len(_HALF)])
        assert target.ask(_SLICE).status == 200

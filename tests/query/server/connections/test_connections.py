"""Connections that send no request, never stop sending, or come by the hundred; host names and Unix sockets."""

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

import psutil
import pytest
import torch

import actstore
from actstore.errors import StorageError
from actstore.query.client.connections import Connections
from actstore.storage.errors import RequestError
from tests.query.running import Running, running
from tests.query.server.test_limits import connected, get, until
from tests.query.stores import WHOLE
from tests.store.example import HOOKS, N

HOOK: Final = HOOKS[0]
HEAD_S: Final = 1.0
N_CONNECTIONS: Final = 40
GROWTH: Final = 40 << 20
"""Bytes that a server may grow by while one client sends without end."""
TRAILER: Final = b"x-%07d: " + b"y" * 4_000 + b"\r\n"
CHUNKED: Final = (
    b"POST /v1/stores/whole.bf16/select HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.fixture(scope="module")
def strict(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with few connections and short timeouts."""
    arguments = ["--root", str(stores), "--connections", str(N_CONNECTIONS), "--head-timeout", str(HEAD_S)]
    folder = tmp_path_factory.mktemp("strict")
    with running(folder, *arguments, "--access-log", str(folder / "access.jsonl")) as server:
        yield server


def rss(server: Running) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def reply_of(connection: socket.socket) -> bytes:
    """Read all until the server hangs up."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            parts.append(data)
    return b"".join(parts)


def status_of_next_reply(connection: socket.socket) -> int:
    """Status of the next reply on an open connection; the whole reply is read, in however many parts it comes."""
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    reply.read()
    return reply.status


def send_without_end(server: Running, begin: bytes, part: bytes, nbytes: int = 64 << 20) -> tuple[int, int]:
    """Bytes that the server took before it hung up, and bytes that it grew by."""
    assert get(server, f"/v1/stores/{WHOLE}")[0] == 200
    before, n_sent, peak = rss(server), 0, 0
    parts = part * max(1, (1 << 16) // len(part))
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(begin)
        while n_sent < nbytes:
            connection.sendall(parts)
            n_sent += len(parts)
            peak = max(peak, rss(server))
    return n_sent, peak - before


@pytest.mark.parametrize(
    ("begin", "part"),
    [
        (b"GET /healthz HTTP/1.1\r\n", TRAILER),
        (b"GET /healthz?", b"y" * 4_000),
        (CHUNKED + b"2\r\n{}\r\n0\r\n", TRAILER),
        (CHUNKED + b"1;", b"y" * 4_000),
        (CHUNKED, b"1\r\n \r\n"),
        (CHUNKED, b"1000\r\n" + b" " * 4096 + b"\r\n"),
        (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ],
    ids=["headers", "URL", "trailers", "extension of a chunk", "tiny chunks", "body", "pipelined"],
)
def test_a_client_that_sends_without_end(strict: Running, begin: bytes, part: bytes) -> None:
    """Trailers once took all memory: 858 MB sent, 5.2 GB kept."""
    n_sent, growth = send_without_end(strict, begin, part)
    assert n_sent < 64 << 20, "it was never stopped"
    assert growth < GROWTH
    assert get(strict, "/healthz")[0] == 200


def test_many_headers(strict: Running) -> None:
    status, _, body = get(strict, "/healthz", headers={f"x-{i}": "" for i in range(200)})
    assert status == 400
    problem = json.loads(body)
    assert problem["type"] == "urn:actstore:problem:invalid"
    assert "128 headers" in problem["detail"]
    assert get(strict, "/healthz", headers={f"x-{i}": "" for i in range(100)})[0] == 200


def test_a_long_url(strict: Running) -> None:
    status, _, body = get(strict, "/healthz?" + "x" * 70_000)
    assert status == 400
    assert "65536 bytes" in json.loads(body)["detail"]
    assert get(strict, "/healthz?" + "x" * 60_000)[0] == 200


def test_a_head_that_does_not_come(strict: Running) -> None:
    """Nothing at all, a part, or a byte now and then: the server closes in time, with a reply if something has come."""
    with contextlib.ExitStack() as stack:
        silent, partial, slow = (stack.enter_context(connected(strict)) for _ in range(3))
        started = time.monotonic()
        partial.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
        assert reply_of(silent) == b""
        head, _, body = reply_of(partial).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert "within 1 s" in json.loads(body)["detail"]
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /healthz HTTP/1.1\r\nHost: " + b"x" * 1000:
                slow.sendall(bytes([byte]))
                time.sleep(HEAD_S / 5)  # never silent for long
        assert time.monotonic() - started < 20 * HEAD_S


def test_between_requests_a_head_has_its_time_anew(strict: Running) -> None:
    address = strict.url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as client:
        for _ in range(3):
            client.request("GET", "/healthz")
            assert client.getresponse().read()
            time.sleep(HEAD_S * 0.6)  # idle for longer in all than a head may take


def test_a_body_that_nobody_waits_for(strict: Running) -> None:
    """The reply is sent, and the rest of the body never comes: the connection is not kept for it."""
    with connected(strict) as connection:
        connection.sendall(
            b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" + b"x" * 10
        )
        started = time.monotonic()
        assert reply_of(connection).startswith(b"HTTP/1.1 404 ")
        assert time.monotonic() - started < 20 * HEAD_S


def test_how_long_an_idle_connection_is_kept(stores: Path, tmp_path: Path) -> None:
    with (
        running(tmp_path, "--root", str(stores), "--keep-alive", "1") as server,
        connected(server) as connection,
    ):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answered = time.monotonic()
        assert reply_of(connection).startswith(
            b"HTTP/1.1 200 "
        )  # the connection ends before 75 s, or this takes too long
        assert time.monotonic() - answered >= 1


def test_upgrade(strict: Running) -> None:
    """The server speaks no other protocol; a body after an upgrade request is not taken for the next request."""
    wish = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    hidden = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(strict) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n" + wish + b"\r\n")
        assert reply_of(connection).startswith(b"HTTP/1.1 200 ")
    with connected(strict) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\n" + wish + b"Content-Length: %d\r\n\r\n" % len(hidden))
        connection.sendall(hidden)
        assert b"HTTP/1.1 200 " not in reply_of(connection)


def test_after_an_early_reply_and_its_body_the_time_between_requests_begins(strict: Running) -> None:
    with connected(strict) as connection:
        connection.sendall(
            b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n" + b"x" * 10
        )
        assert status_of_next_reply(connection) == 404
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status_of_next_reply(connection) == 200


def test_hundreds_of_idle_connections(strict: Running) -> None:
    """The longest idle ones are closed; requests and health checks of all clients are answered all the time."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(strict, source=f"127.0.0.{2 + i % 7}")) for i in range(300)]
        for source in ("127.0.0.1", "127.0.0.2"):
            assert get(strict, "/healthz", source=source)[0] == 200
            assert get(strict, f"/v1/stores/whole.bf16/hooks/{HOOK}/slice?seq=0", source=source)[0] == 200
        assert len(psutil.Process(strict.process.pid).net_connections("tcp")) < N_CONNECTIONS + 40
        assert all(reply_of(connection) == b"" for connection in idle)


def test_busy_connections_leave_some_for_health(stores: Path, tmp_path: Path) -> None:
    """All connections have a request whose body does not come, yet health checks are answered."""
    begun = (
        b"POST /v1/stores/whole.bf16/select HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n"
    )
    with (
        running(tmp_path, "--root", str(stores), "--connections", "8") as server,
        contextlib.ExitStack() as stack,
    ):
        sources = iter(range(2, 250))

        def is_full() -> bool:
            # A connection whose head was not read yet may be closed for the next one, so another takes its place.
            client = stack.enter_context(connected(server, source=f"127.0.0.{next(sources)}"))
            client.sendall(begun)
            status, headers, _ = get(server, "/v1/stores")
            return status == 503 and headers["Connection"] == "close"

        until(is_full)
        assert get(server, "/healthz")[0] == get(server, "/readyz")[0] == 200


def test_few_file_descriptors(stores: Path, tmp_path: Path) -> None:
    """With 320 of them, and 600 connections of several clients, the server goes on."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (320, 320))

    executable = Path(sys.executable).parent / "actstore"
    command = [str(executable), "serve", "--root", str(stores), "--port", "0", "--json"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=few)
    assert process.stdout is not None
    server = Running(process, process.stdout.readline(), tmp_path / "log")
    try:
        with contextlib.ExitStack() as stack:
            for i in range(600):
                stack.enter_context(connected(server, source=f"127.0.0.{2 + i % 20}"))
            assert get(server, "/healthz")[0] == 200
            assert get(server, f"/v1/stores/whole.bf16/hooks/{HOOK}/slice?seq=0")[0] == 200
    finally:
        assert server.stop() == 0
        process.stdout.close()


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "[::2]", "a b"]
)
def test_a_name_that_is_not_the_servers(strict: Running, host: str) -> None:
    """A page whose name resolves to 127.0.0.1 cannot read the stores."""
    for path in ("/", "/v1/stores", "/docs"):
        status, _, body = get(strict, path, headers={"Host": host})
        assert status == 421
        assert json.loads(body)["type"] == "urn:actstore:problem:host"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "127.3.2.1"])
def test_names_of_loopback(strict: Running, host: str) -> None:
    assert get(strict, "/v1/stores", headers={"Host": host})[0] == 200


def test_allowed_hosts(stores: Path, tmp_path: Path) -> None:
    arguments = ["--root", str(stores), "--allowed-host", "box.lan", "--allowed-host", "10.0.0.7"]
    with running(tmp_path, *arguments) as server:
        assert get(server, "/v1/stores", headers={"Host": "box.lan:8000"})[0] == 200
        assert get(server, "/v1/stores", headers={"Host": "10.0.0.7"})[0] == 200
        assert get(server, "/v1/stores", headers={"Host": "other.lan"})[0] == 421


@pytest.mark.parametrize("is_trusted", [False, True])
def test_forwarded_for(stores: Path, tmp_path: Path, is_trusted: bool) -> None:
    """Only a trusted proxy may name another client: others would escape the limit of a client."""
    log = tmp_path / "access.jsonl"
    arguments = ["--root", str(stores), "--access-log", str(log)]
    if is_trusted:
        arguments += ["--forwarded-allow-ips", "127.0.0.1"]
    with running(tmp_path, *arguments) as server:
        assert get(server, "/v1/stores", headers={"X-Forwarded-For": "10.9.8.7"})[0] == 200
        until(lambda: log.read_text().count("\n") == 1)
    assert json.loads(log.read_text())["client"] == ("10.9.8.7" if is_trusted else "127.0.0.1")


def test_access_log(stores: Path, tmp_path: Path) -> None:
    """One line for each request, with its store and bytes, and without tokens or queries."""
    log, tokens, token = tmp_path / "access.jsonl", tmp_path / "tokens", "t0ken-of-somebody-1234"
    named = f"{token}-named"
    tokens.write_text(f"{token}\n{named} name=ann\n")
    bearer = {"Authorization": f"Bearer {token}"}
    path = f"/v1/stores/whole.bf16/hooks/{HOOK}/slice"
    with running(
        tmp_path, "--root", str(stores), "--token-file", str(tokens), "--access-log", str(log)
    ) as server:
        _, _, body = get(server, f"{path}?seq=0:2", headers=bearer)
        assert get(server, path, headers={"Authorization": "Bearer wrong-wrong-wrong-wrong"})[0] == 401
        assert get(server, "/v1/stores/none", headers=bearer)[0] == 404
        anns = {"Authorization": f"Bearer {named}"}
        assert get(server, path, headers=anns)[0] == 200
        until(lambda: log.read_text().count("\n") == 4)
        counted = get(server, "/metrics", headers=anns)[2].decode()
    assert 'actstore_client_requests_total{client="ann",status="200"} 1.0' in counted
    assert f'actstore_client_reply_bytes_total{{client="ann"}} {len(body) / 2 * N}' in counted
    assert "127.0.0.1" not in counted
    text = log.read_text()
    assert token not in text
    assert "seq=" not in text
    good, refused, missing, by_name, _ = map(json.loads, text.splitlines())
    assert (by_name["client"], by_name["status"]) == ("ann", 200)
    assert (good["status"], good["store"], good["path"], good["method"]) == (200, WHOLE, path, "GET")
    assert good["bytes"] == len(body)
    assert 0 <= good["seconds"] < 60
    assert good["client"] not in ("127.0.0.1", token)
    assert (refused["status"], refused["client"], refused["store"]) == (401, "127.0.0.1", None)
    assert (missing["status"], missing["store"], missing["client"]) == (404, None, good["client"])


def test_refusals_are_in_the_access_log(stores: Path, tmp_path: Path) -> None:
    """Connections without a valid request, and one that there was no room for."""
    log = tmp_path / "access.jsonl"
    arguments = ["--root", str(stores), "--access-log", str(log), "--head-timeout", "1", "--connections", "2"]
    with running(tmp_path, *arguments) as server, contextlib.ExitStack() as stack:
        for sent in (b"no HTTP\r\n\r\n", b"GET / HTTP/1.1\r\n" + TRAILER * 40, b"GET /secret HTTP/1.1\r\n"):
            with connected(server) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(sent)
                reply_of(connection)
        until(lambda: log.read_text().count("\n") == 3)
        sources = iter(range(2, 5))
        for status in (b"100", b"100", b"503"):
            client = stack.enter_context(connected(server, source=f"127.0.0.{next(sources)}"))
            client.sendall(CHUNKED.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
            assert client.recv(100).split(b" ", 2)[1] == status
        until(lambda: '"status": 503' in log.read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines[:3]] == [400, 431, 408]
    assert all(
        (line["client"], line["method"], line["path"]) == ("127.0.0.1", None, None) for line in lines[:3]
    )
    assert lines[2]["seconds"] >= 0.99  # the clock of the event loop has whole milliseconds


def test_an_end_says_what_it_waits_for(stores: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--root", str(stores)) as server, connected(server) as connection:
        connection.sendall(CHUNKED)
        until(lambda: psutil.Process(server.process.pid).net_connections("tcp") != [])
        assert get(server, "/healthz")[0] == 200  # so the head of the other request was read
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "waiting for a request: POST /v1/stores/whole.bf16/select" in server.log.read_text())


def test_an_end_says_once_what_it_waits_for(stores: Path, tmp_path: Path) -> None:
    """This also holds with two sockets."""
    path = tmp_path / "socket"
    with running(tmp_path, "--root", str(stores), "--uds", str(path)) as server:
        with socket.socket(socket.AF_UNIX) as local, connected(server) as connection:
            local.connect(str(path))
            for client in (local, connection):
                client.sendall(CHUNKED.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
                assert client.recv(100).startswith(b"HTTP/1.1 100 ")
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "waiting for 2 requests" in server.log.read_text())
        assert server.process.wait(60) == 0
        assert server.log.read_text().count("waiting for") == 1


UPLOAD: Final = (
    b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n"
)


@pytest.mark.parametrize("closes", [False, True], ids=["keep-alive", "close"])
@pytest.mark.parametrize(
    ("path", "status"), [(b"/v1/stores/whole.bf16/select", b"413"), (b"/" + b"x" * 70_000, b"400")]
)
def test_an_upload_that_is_refused_gets_its_reply(
    strict: Running, path: bytes, status: bytes, closes: bool
) -> None:
    """Many clients send all of it before they read; a reset would take the reply from them."""
    nbytes = 24 << 20
    with connected(strict) as connection:
        connection.sendall(UPLOAD % (path, nbytes, b"Connection: close\r\n" if closes else b""))
        for _ in range(nbytes >> 20):
            connection.sendall(b" " * (1 << 20))
        reply = b""
        while data := connection.recv(1 << 16):
            reply += data
    assert reply.startswith(b"HTTP/1.1 %b " % status)
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["status"] == int(status)


@pytest.mark.parametrize("path", [b"/nothing", b"/v1/stores/whole.bf16/select"])
def test_a_body_that_was_not_asked_for_is_no_next_request(strict: Running, path: bytes) -> None:
    """A client that is refused at once need not send the body, and may go on with another request."""
    hidden = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(strict) as connection:
        connection.sendall(UPLOAD % (path, 5 << 20, b"Expect: 100-continue\r\n"))
        head = connection.recv(1 << 16)
        assert head.split()[1] in (b"404", b"413")
        assert b"\r\nconnection: close\r\n" in head
        with contextlib.suppress(ConnectionError):
            connection.sendall(hidden)
        assert b"HTTP/1.1 " not in reply_of(connection)


def test_a_body_that_was_asked_for_keeps_the_connection(strict: Running) -> None:
    body = b'{"hooks": ["tokens"], "sequences": [0]}'
    with connected(strict) as connection:
        for _ in range(2):
            connection.sendall(
                UPLOAD % (b"/v1/stores/whole.bf16/select", len(body), b"Expect: 100-continue\r\n")
            )
            assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            reply = connection.recv(1 << 16)
            assert reply.startswith(b"HTTP/1.1 200 ")
            length = int(re.search(rb"content-length: ([0-9]+)", reply)[1])  # type: ignore[index]
            while len(reply.partition(b"\r\n\r\n")[2]) < length:
                reply += connection.recv(1 << 16)


def test_unix_socket(stores: Path, tmp_path: Path) -> None:
    """The socket is for clients of the same user; it replaces that of a killed server, and is removed at the end."""
    path = tmp_path / "a socket"

    def asked() -> int:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(path))
            client.sendall(b"GET /v1/stores HTTP/1.1\r\nHost: anything\r\nConnection: close\r\n\r\n")
            return int(reply_of(client).split(b" ", 2)[1])

    with running(tmp_path, "--root", str(stores), "--uds", str(path)) as server:
        assert asked() == 200
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    assert path.exists()
    with running(tmp_path, "--root", str(stores), "--uds", str(path), "--workers", "2") as server:
        assert asked() == 200
        taken = subprocess.run(
            [
                Path(sys.executable).parent / "actstore",
                "serve",
                "--root",
                stores,
                "--port",
                "0",
                "--uds",
                path,
            ],
            check=False,
            capture_output=True,
            text=True,
        )
        assert taken.returncode == 1
        assert "choose another --uds" in taken.stderr
        assert server.stop() == 0
    assert not path.exists()


def test_a_store_over_a_unix_socket(stores: Path, tmp_path: Path) -> None:
    """It is the same store as over TCP, and the server makes its batches."""
    path = tmp_path / "Socket: ü%"
    expected = actstore.open(str(stores / WHOLE))
    with running(tmp_path, "--root", str(stores), "--uds", str(path)) as server:
        url = f"http+unix://{quote(str(path), safe='')}/v1/stores/{WHOLE}"
        assert json.loads(server.said)["urls"] == [server.url, url.removesuffix(f"/v1/stores/{WHOLE}")]
        for direct in (None, False, True):
            store = actstore.open(url, direct=direct)
            assert torch.equal(store[HOOK][:].view(torch.int16), expected[HOOK][:].view(torch.int16))
            with (
                store.loader(HOOK, batch_size=16, seed=1) as loader,
                expected.loader(HOOK, batch_size=16, seed=1) as local,
            ):
                for ours, theirs in zip(loader, local, strict=True):
                    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
        with pytest.raises(StorageError, match="knows no Unix sockets"):
            _ = actstore.open(url).zarr
    with (
        pytest.raises(RequestError, match="there is no socket"),
        Connections().request("GET", url, {}),
    ):
        pass

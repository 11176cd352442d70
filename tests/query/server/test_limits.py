"""Clients that ask for too much, take nothing, or go away; storage that hangs; a server that is shutting down."""

import contextlib
import http.client
import json
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
import pytest
from numpy.typing import NDArray

from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.compression import Compression
from actstore.store.records.seal import seal
from tests.conftest import S3Server
from tests.query.running import Running, running
from tests.query.stores import WHOLE
from tests.query.tcp_proxy import TcpProxy, tcp_proxy
from tests.store.example import LENGTH, example_plan, example_values, write_store
from tests.store.runs import with_hooks

HOOK: Final = "blocks.0.hook_resid_post"
ROW_NBYTES: Final = LENGTH * 16 * 4
N_ROWS: Final = (64 << 20) // ROW_NBYTES
MAX_REPLY: Final = (64 << 20) - 1
"""Bytes of the large stores but one row."""
LARGE: Final = f"/hooks/{HOOK}/slice?seq=1:"
BATCH: Final = f"/batches/0?hook={HOOK}&shuffle=none&batch_size="
BATCH_ROWS: Final = (16 << 20) // 64
"""Rows of 64 bytes; a server sends 50 of such batches at once."""
STALL_S: Final = 2.0
TIMEOUT_S: Final = 2.0
DEADLINE_S: Final = 60.0
N_SLOW: Final = 50
PIECE_NBYTES: Final = 2 << 20
"""Bytes that are given to a socket at once."""


def write(blobs: Blobs, n_rows: int, n_shards: int, compression: Compression | None = None) -> NDArray[Any]:
    plan = example_plan(
        "float32", compression, n_sequences=n_rows, n_tokens=n_rows * LENGTH, segment_size=n_rows // n_shards
    )
    plan = with_hooks(plan, HOOK)
    values = example_values(plan)
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)
    return values[HOOK]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[Any]]:
    """A folder with two stores of 64 MiB, ``plain`` and ``packed``, which is compressed; and their values."""
    folder = tmp_path_factory.mktemp("large")
    values = write(LocalBlobs(folder / "plain"), N_ROWS, 4)
    write(LocalBlobs(folder / "packed"), N_ROWS, 4, "lz4")
    return folder, values


@pytest.fixture(scope="module")
def patient(large: tuple[Path, NDArray[Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that admits many clients, and cuts off those that take nothing soon."""
    arguments = ["--root", str(large[0]), "--stall", str(STALL_S), "--max-reply", str(MAX_REPLY)]
    with running(tmp_path_factory.mktemp("log"), *arguments) as server:
        yield server


def connected(server: Running, *, source: str = "127.0.0.1", receives: int | None = None) -> socket.socket:
    """A connection whose system buffers ``receives`` bytes, or the default."""
    connection = socket.socket()
    if receives is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    connection.settimeout(DEADLINE_S)
    try:
        connection.bind((source, 0))
        connection.connect((address.hostname, address.port))
    except BaseException:
        connection.close()
        raise
    return connection


def ask(connection: socket.socket, path: str) -> None:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())


def begun(connection: socket.socket) -> tuple[int, bytes]:
    """Status, and what came of the reply with its head; the rest is not read."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(1000)
        assert more, data
        data += more
    return int(data.split(b" ", 2)[1]), data


def rest(connection: socket.socket) -> bytes:
    """Read until the other side hangs up, in whatever way."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(1 << 20):
            parts.append(more)
    return b"".join(parts)


def get(
    server: Running, path: str, *, source: str = "127.0.0.1", method: str = "GET", **options: Any
) -> tuple[int, http.client.HTTPMessage, bytes]:
    address = urlsplit(server.url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(
        address.hostname, address.port, timeout=DEADLINE_S, source_address=(source, 0)
    )
    with contextlib.closing(connection):
        connection.request(method, path, **options)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()


def counters(server: Running) -> dict[str, float]:
    """All samples of /metrics, with their labels."""
    text = get(server, "/metrics")[2].decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def until(is_so: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def processes(server: Running) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in server.workers() or [server.process.pid]]


def own_nbytes(server: Running) -> int:
    """Memory of the server without mapped files."""
    infos = [process.memory_info() for process in processes(server)]
    return sum(info.rss - info.shared for info in infos)


def n_connections(server: Running) -> int:
    connections = [
        connection for process in processes(server) for connection in process.net_connections("tcp")
    ]
    return sum(connection.status != psutil.CONN_LISTEN for connection in connections)


def left_to_the_system(server: Running) -> list[str]:
    """Connections that the server has closed, and on which the system still has data to send."""
    port = urlsplit(server.url).port
    return [
        one.status
        for one in psutil.net_connections("tcp")
        if one.laddr and one.laddr.port == port and one.pid is None and one.status.startswith("FIN_WAIT")
    ]


@pytest.mark.parametrize(
    ("store", "path", "allowed"),
    [
        # Files are mapped; what is sent is not copied.
        ("plain", LARGE, N_SLOW * (1 << 19)),
        # The system has one piece, one waits, one is made; the rest is what malloc does not give back.
        ("packed", LARGE, N_SLOW * 9 * PIECE_NBYTES // 2),
        # All of them share one batch.
        ("plain", f"{BATCH}{BATCH_ROWS}", 2 * 64 * BATCH_ROWS + N_SLOW * (1 << 19)),
    ],
    ids=["slice", "compressed", "batch"],
)
def test_clients_that_take_nothing(patient: Running, store: str, path: str, allowed: int) -> None:
    """50 at once hold little memory, are cut off, and leave nothing behind."""
    url = f"/v1/stores/{store}"
    assert get(patient, f"{url}/hooks/{HOOK}/slice?seq=0:8")[0] == 200
    before, n_before = own_nbytes(patient), n_connections(patient)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(patient, receives=4096)) for _ in range(N_SLOW)]
        for connection in slow:
            ask(connection, url + path)
        heads = [begun(connection) for connection in slow]
        started = time.monotonic()
        peak = own_nbytes(patient)
        assert [status for status, _ in heads] == [200] * N_SLOW
        assert get(patient, "/healthz")[0] == 200

        def are_gone() -> bool:
            nonlocal peak
            peak = max(peak, own_nbytes(patient))
            return n_connections(patient) <= n_before

        until(are_gone)
        seconds = time.monotonic() - started
        assert not left_to_the_system(patient)
        for (_, head), connection in zip(heads, slow, strict=True):
            length = re.search(rb"content-length: ([0-9]+)", head)
            assert length is not None
            assert len(head.partition(b"\r\n\r\n")[2]) + len(rest(connection)) < int(length[1])
    assert peak - before <= allowed, f"{peak - before:,} bytes for {N_SLOW} clients"
    # The server waits for so long, and the system once more for its data.
    assert seconds < 2 * STALL_S + 10
    assert get(patient, url + LARGE)[0] == 200


def test_requests_that_are_too_large(patient: Running) -> None:
    url = "/v1/stores/plain/select"
    body = json.dumps({"hooks": [HOOK], "sequences": [1] * (3 << 20)}).encode()
    assert len(body) > 4 << 20
    headers = {"Content-Type": "application/json"}
    chunks = [body[start : start + 65536] for start in range(0, len(body), 65536)]
    for options in ({"body": body}, {"body": iter(chunks), "encode_chunked": True}):
        chunked = {"Transfer-Encoding": "chunked"} if "encode_chunked" in options else {}
        status, head, answer = get(patient, url, method="POST", headers=headers | chunked, **options)
        assert (status, head["Content-Type"]) == (413, "application/problem+json")
        assert json.loads(answer)["type"] == "urn:actstore:problem:too-large"
        assert "4194304 bytes" in json.loads(answer)["detail"]
    small = json.dumps({"hooks": [HOOK], "sequences": [1, 7]}).encode()
    assert get(patient, url, method="POST", headers=headers, body=small)[0] == 200


def test_replies_that_are_too_large(patient: Running) -> None:
    whole = get(patient, f"/v1/stores/plain/hooks/{HOOK}/slice")
    select = json.dumps({"hooks": [HOOK]}).encode()
    several = get(
        patient,
        "/v1/stores/plain/select",
        method="POST",
        body=select,
        headers={"Content-Type": "application/json"},
    )
    batch = get(patient, f"/v1/stores/plain{BATCH}{N_ROWS * LENGTH}")
    for status, _, answer in (whole, several, batch):
        assert status == 413
        problem = json.loads(answer)
        assert problem["type"] == "urn:actstore:problem:too-large"
        assert str(MAX_REPLY) in problem["detail"]
    part = get(patient, f"/v1/stores/plain/hooks/{HOOK}/slice?seq=0:{N_ROWS - 1}")
    assert (part[0], len(part[2])) == (200, (N_ROWS - 1) * ROW_NBYTES)


@pytest.fixture(scope="module")
def hanging(
    s3_server: S3Server, large: tuple[Path, NDArray[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, TcpProxy, NDArray[Any]]]:
    """A server that admits 8 requests, 4 of a client, and soon reports when it is late; its store ``far`` is on S3
    behind a proxy, in 16 shards of 2 MiB.
    """
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/far"
    values = write(open_blobs(url), N_ROWS // 2, 16)
    with (
        tcp_proxy(s3_server.endpoint) as proxy,
        running(
            tmp_path_factory.mktemp("log"),
            str(large[0] / "plain"),
            url,
            "--concurrency",
            "8",
            "--timeout",
            str(TIMEOUT_S),
            AWS_ENDPOINT_URL=proxy.url,
        ) as server,
    ):
        yield server, proxy, values


def test_no_more_at_once_than_allowed(hanging: tuple[Running, TcpProxy, NDArray[Any]]) -> None:
    server = hanging[0]
    small = f"/v1/stores/plain/hooks/{HOOK}/slice?seq=0:1"
    addresses = ("127.0.0.1", "127.0.0.2")
    with contextlib.ExitStack() as stack:
        busy = []
        for source in addresses:
            assert get(server, small, source=source)[0] == 200
            for _ in range(4):
                connection = stack.enter_context(connected(server, source=source, receives=4096))
                ask(connection, "/v1/stores/plain" + LARGE)
                assert begun(connection)[0] == 200
                busy.append(connection)
            if source == addresses[0]:
                # One client has all that it may have, which does not affect the other one.
                status, head, answer = get(server, small, source=source)
                assert (status, head["Retry-After"]) == (429, "1")
                assert json.loads(answer)["type"] == "urn:actstore:problem:too-many"
        for source in (*addresses, "127.0.0.3"):
            status, head, answer = get(server, small, source=source)
            assert (status, head["Retry-After"]) == (503, "1")
            assert json.loads(answer)["type"] == "urn:actstore:problem:busy"
            assert get(server, "/healthz", source=source)[0] == 200
        for connection in busy:
            connection.close()
        # The places of clients that left are free long before these would be cut off.
        until(lambda: get(server, small, source="127.0.0.3")[0] == 200)
    until(lambda: all(get(server, small, source=source)[0] == 200 for source in addresses))


def test_storage_that_hangs(hanging: tuple[Running, TcpProxy, NDArray[Any]]) -> None:
    """The client gets an error in time; requests without the storage are answered, and all are once it is back."""
    server, proxy, values = hanging
    small = f"/v1/stores/far/hooks/{HOOK}/slice?seq=5:9"
    expected = values[5:9].tobytes()
    assert get(server, small)[2] == expected
    proxy.flows.clear()
    for _ in range(3):
        started = time.monotonic()
        status, head, answer = get(server, small)
        seconds = time.monotonic() - started
        assert (status, head["Retry-After"]) == (503, "1")
        assert "did not begin within 2 s" in json.loads(answer)["detail"]
        assert 0.9 * TIMEOUT_S < seconds < TIMEOUT_S + 5
        assert get(server, "/healthz")[0] == 200
        assert get(server, f"/v1/stores/plain/hooks/{HOOK}/slice?seq=0:8")[0] == 200
    proxy.flows.set()
    until(lambda: get(server, small)[2] == expected)


def test_what_comes_too_late_is_not_sent(hanging: tuple[Running, TcpProxy, NDArray[Any]]) -> None:
    """A client whose request took too long goes on with the connection: the late reply must not be on it."""
    server, proxy, values = hanging
    n = (PIECE_NBYTES * 3 // 2) // ROW_NBYTES
    path = f"/v1/stores/far/hooks/{HOOK}/slice?seq=0:{n}"
    until(lambda: get(server, path)[2] == values[:n].tobytes())
    proxy.flows.clear()
    source = "127.0.0.5"  # requests of other clients that were given up may still be under way
    with contextlib.ExitStack() as stack:
        # As many as a client may have under way, so that another one is admitted once one of them has ended.
        late = [stack.enter_context(connected(server, source=source)) for _ in range(4)]
        for connection in late:
            ask(connection, path)
        for connection in late:
            reply = http.client.HTTPResponse(connection)
            stack.callback(reply.close)
            reply.begin()
            assert reply.status == 503
            reply.read()
        assert get(server, path, source=source)[0] == 429
        proxy.flows.set()
        until(lambda: get(server, path, source=source)[2] == values[:n].tobytes())
        for connection in late:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            came = rest(connection)
            assert came.startswith(b"HTTP/1.1 200 ")
            assert len(came) < 1000


def test_bodies_and_plans_count_as_memory(stores: Path, tmp_path: Path) -> None:
    """A body is large once it is parsed, and so is a plan before it is sent."""
    url, headers = f"/v1/stores/{WHOLE}", {"Content-Type": "application/json"}

    def asked(n_numbers: int) -> bytes:
        return json.dumps({"hooks": ["lengths"], "sequences": [1] * n_numbers}).encode()

    def select(n_numbers: int, source: str = "127.0.0.1") -> tuple[int, http.client.HTTPMessage, Any]:
        body = asked(n_numbers)
        status, head, answer = get(
            server, f"{url}/select", source=source, method="POST", headers=headers, body=body
        )
        return status, head, json.loads(answer) if status != 200 else None

    def plan(**select: Any) -> tuple[int, Any]:
        body = json.dumps({"select": select}).encode()
        status, _, answer = get(server, f"{url}/plan", method="POST", headers=headers, body=body)
        return status, json.loads(answer)

    def held_nbytes() -> float:
        return counters(server)["actstore_memory_bytes"]

    with running(tmp_path, "--root", str(stores), "--memory", str(1 << 20)) as server:
        assert select(10_000)[0] == 200
        until(lambda: held_nbytes() == 0)  # a moment after a reply
        status, _, problem = select(20_000)
        assert status == 413
        assert "this request takes up to" in problem["detail"]
        until(lambda: held_nbytes() == 0)
        head = f"POST {url}/select HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with connected(server) as connection:
            body = asked(10_000)
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
            until(lambda: select(10_000)[0] == 503)
            status, head_of_reply, problem = select(10_000)
            assert (status, int(head_of_reply["Retry-After"]) >= 1) == (503, True)
            assert "requests, replies and batches of this client" in problem["detail"]
            held = held_nbytes()
            assert select(10_000, "127.0.0.2")[0] == 200
            # Its memory is given back a moment after the reply.
            until(lambda: held_nbytes() <= held)
            connection.sendall(body[-1:])
            assert begun(connection)[0] == 200
        until(lambda: select(10_000)[0] == 200)
        until(lambda: held_nbytes() == 0)
        status, document = plan(hooks=["*"], sequences="0:2")
        assert status == 200
        assert document["reads"]
        status, document = plan(hooks=["*"], positions="0::2")
        assert status == 413
        assert "this plan takes" in document["detail"]


@pytest.mark.parametrize("has_other", [True, False])
def test_health_while_all_threads_wait_for_storage(
    s3_server: S3Server, large: tuple[Path, NDArray[Any]], tmp_path: Path, has_other: bool
) -> None:
    """More requests wait for storage than there are threads; a server without other storage reports that it is not
    ready.
    """
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/far"
    write(open_blobs(url), 64, 1)
    small = f"/v1/stores/far/hooks/{HOOK}/slice?seq=0"
    stores = [str(large[0] / "plain"), url] if has_other else [url]
    with (
        tcp_proxy(s3_server.endpoint) as proxy,
        running(tmp_path, *stores, "--concurrency", "400", AWS_ENDPOINT_URL=proxy.url) as server,
        contextlib.ExitStack() as stack,
    ):
        assert get(server, "/readyz")[0] == get(server, small)[0] == 200
        proxy.flows.clear()

        def is_stuck() -> bool:
            # The pages need no storage, only a thread.
            ask(stack.enter_context(connected(server)), small)
            with contextlib.closing(connected(server)) as client:
                client.settimeout(1.0)
                ask(client, "/docs")
                try:
                    return not client.recv(1)
                except TimeoutError:
                    return True

        until(is_stuck)
        assert get(server, "/healthz")[0] == 200
        status, _, body = get(server, "/readyz")
        if has_other:
            assert status == 200
        else:
            assert status == 503
            assert "did not answer within 3 s" in json.loads(body)["detail"]
        proxy.flows.set()
        until(lambda: get(server, "/readyz")[0] == 200)


def test_nothing_is_read_for_a_client_that_is_gone(
    hanging: tuple[Running, TcpProxy, NDArray[Any]],
) -> None:
    server, proxy, values = hanging
    path = f"/v1/stores/far/hooks/{HOOK}/slice"
    route = 'actstore_requests_total{method="GET",route="/v1/stores/{store}/hooks/{hook}/slice",status="200"}'
    source = "127.0.0.6"  # requests of other clients that were given up may still be under way
    until(lambda: get(server, path, source=source)[0] == 200)
    before = proxy.nbytes
    assert get(server, path, source=source)[2] == values.tobytes()
    whole = proxy.nbytes - before
    assert whole > values.nbytes
    n_requests, before = counters(server)[route], proxy.nbytes
    with connected(server, source=source, receives=4096) as connection:
        ask(connection, path)
        assert begun(connection)[0] == 200
    until(lambda: counters(server)[route] == n_requests + 1)
    # Two pieces, and what the sockets on the way hold.
    assert proxy.nbytes - before < whole / 2


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_download_is_finished_when_the_server_ends(
    large: tuple[Path, NDArray[Any]], tmp_path: Path, n_workers: int
) -> None:
    folder, values = large
    with running(tmp_path, str(folder / "plain"), "--workers", str(n_workers)) as server:
        check_counters(server)
        with connected(server, receives=1 << 16) as connection:
            ask(connection, "/v1/stores/plain" + LARGE)
            status, data = begun(connection)
            assert status == 200
            server.process.send_signal(signal.SIGTERM)
            body = data.partition(b"\r\n\r\n")[2] + rest(connection)
        assert body == values[1:].tobytes()
        assert server.process.wait(DEADLINE_S) == 0
        with pytest.raises(ConnectionRefusedError):
            connected(server)
    assert "Traceback" not in server.log.read_text()


def check_counters(server: Running) -> None:
    """Check the counters of all processes together, whichever of them answers."""
    store = server.store("plain", direct=False)
    slices = 'route="/v1/stores/{store}/hooks/{hook}/slice"'
    requests = f'actstore_requests_total{{method="GET",{slices},status="200"}}'
    nbytes = f"actstore_reply_bytes_total{{{slices}}}"
    seconds = f"actstore_request_seconds_count{{{slices}}}"
    wrong = 'actstore_requests_total{method="GET",route="other",status="404"}'
    before = counters(server)
    for _ in range(10):
        get(server, f"/v1/stores/plain/hooks/{HOOK}/slice?seq=0:4")
        get(server, "/nothing")
    options: dict[str, Any] = {"batch_size": 1 << 12, "shuffle": "window", "window_rows": 1 << 16}
    for _ in range(2):
        with store.loader(HOOK, **options) as loader:
            for _ in range(6):
                next(loader)
    after = counters(server)

    def moved(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert moved(requests) == moved(seconds) == 10
    assert moved(nbytes) == 10 * 4 * ROW_NBYTES
    assert moved(wrong) == 10

    made = given = asked = 0.0

    def is_quiet() -> bool:
        """Whether no batch is under way, of those that a loader requested ahead."""
        nonlocal after, made, given, asked
        after = counters(server)
        made, given = moved("actstore_batches_made_total"), moved("actstore_batches_shared_total")
        asked = sum(moved(name) for name in after if "requests_total" in name and "batches/{k}" in name)
        return made + given == asked

    until(is_quiet)
    assert asked >= 12
    assert made >= 1
    if not server.workers():
        assert given >= 6  # all that the second loader requested


def test_connections_that_come_at_once(large: tuple[Path, NDArray[Any]], tmp_path: Path) -> None:
    """Each takes a part of a long reply and no more. Refused connections free no place for others."""
    with (
        running(tmp_path, "--root", str(large[0]), "--connections", "8") as server,
        contextlib.ExitStack() as stack,
    ):
        statuses = []
        for _ in range(60):
            connection = stack.enter_context(connected(server, receives=1 << 16))
            with contextlib.suppress(ConnectionError):
                ask(connection, "/v1/stores/plain" + LARGE)
                statuses.append(begun(connection)[0])
        assert statuses.count(200) == 4  # half of them, as all have one address
        assert get(server, "/healthz", source="127.0.0.9")[0] == 200

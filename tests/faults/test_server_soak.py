"""Two hundred clients of every kind at one server, for a minute: it stays small, serves honest ones, and recovers."""

import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import psutil
import pytest
from numpy.typing import NDArray

from actstore.storage.local import LocalBlobs
from tests.query.running import Running, running
from tests.query.server.test_limits import HOOK, ROW_NBYTES, write

SOAK_S: Final = float(os.environ.get("SOAK_S", "60"))
"""Seconds for which the clients go on."""
BUDGET: Final = 1 << 30
ALLOWED: Final = BUDGET + (300 << 20)
N_ROWS: Final = (256 << 20) // ROW_NBYTES
BATCH_ROWS: Final = (16 << 20) // (16 * 4)
"""Rows of 64 bytes in a batch of 16 MiB."""
N_ORDERS: Final = 16
RESPONSE_S: Final = 60.0
HEALTH_S: Final = 10.0
"""Seconds within which a health check must be answered, on a machine that does all this on two cores."""
HONEST: Final = [f"honest-{i}-0123456789" for i in range(6)]
GREEDY: Final = [f"greedy-{i}-0123456789" for i in range(4)]
STORE: Final = "/v1/stores/plain"


class Soak:
    """What the clients share: the server, the remaining time, and what they saw."""

    def __init__(self, server: Running, values: NDArray[Any]) -> None:
        address = urlsplit(server.url)
        assert address.hostname is not None
        assert address.port is not None
        self.address = (address.hostname, address.port)
        self.values = values
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.health: list[float] = []
        self.faults: list[str] = []

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        with self.lock:
            self.faults.append(what)
        self.over.set()

    def connected(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=RESPONSE_S)

    def http(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=RESPONSE_S)


def get(
    client: http.client.HTTPConnection, path: str, token: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    client.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    reply = client.getresponse()
    return reply.status, reply.headers, reply.read()


def slices(soak: Soak, number: int) -> None:
    """Read one row at a time over one connection, with a pause; busy replies are repeated, as clients do."""
    rng = random.Random(number)
    client = soak.http()
    while not soak.over.is_set():
        row = rng.randrange(N_ROWS)
        started = time.monotonic()
        path = f"{STORE}/hooks/{HOOK}/slice?seq={row}"
        try:
            status, _, body = get(client, path, HONEST[number % len(HONEST)])
        except TimeoutError:
            soak.fault(f"a slice took more than {RESPONSE_S} s")
            break
        except (ConnectionError, http.client.HTTPException):
            soak.count("slices: connection closed")  # idle, and dropped for another client
            client.close()
            continue
        if status == 200:
            if body != soak.values[row].tobytes():
                soak.fault(f"row {row} has other bytes")
            with soak.lock:
                soak.latencies.append(time.monotonic() - started)
        elif status not in (429, 503):
            soak.fault(f"a slice was answered with {status}: {body[:200]!r}")
        soak.count(f"slices: {status}")
        soak.over.wait(0.2 if status == 200 else 1.0)
    client.close()


def batches(soak: Soak, number: int) -> None:
    """Train on 16 orders, with two trainers each."""
    client, token = soak.http(), GREEDY[number % len(GREEDY)]
    for k in itertools.count():
        if soak.over.is_set():
            break
        path = (
            f"{STORE}/batches/{k % 16}?hook={HOOK}&batch_size={BATCH_ROWS}&seed={number % N_ORDERS}"
            f"&shuffle={'window' if number % 3 else 'global'}&window_rows=65536"
        )
        try:
            status, _, body = get(client, path, token)
        except (ConnectionError, http.client.HTTPException):
            client.close()
            continue
        soak.count(f"batches: {status}")
        if status == 200 and len(body) != BATCH_ROWS * 64:
            soak.fault(f"a batch has {len(body)} bytes")
        elif status not in (200, 429, 503):
            soak.fault(f"a batch was answered with {status}: {body[:200]!r}")
        soak.over.wait(0.1 if status == 200 else 1.0)
    client.close()


def scans(soak: Soak, number: int) -> None:
    """Send requests that scan a whole array, each a different one."""
    client = soak.http()
    for k in itertools.count():
        if soak.over.is_set():
            break
        limit = 4.0 + number + k / 1000
        path = (
            f"{STORE}/batches?hook={HOOK}&batch_size=4096&max_norm={limit}"
            if k % 2
            else f"{STORE}/prompts?tokens={quote(f'{k % 97},{number}')}&limit=5"
        )
        try:
            status, _, _ = get(client, path, GREEDY[number % len(GREEDY)])
        except (ConnectionError, http.client.HTTPException):
            client.close()
            continue
        soak.count(f"scans: {status}")
        if status not in (200, 422, 429, 503):
            soak.fault(f"a scan was answered with {status}")
        soak.over.wait(0.2)
    client.close()


def slow_readers(soak: Soak, number: int) -> None:
    """Read a large reply at 8 kB/s."""
    token = GREEDY[number % len(GREEDY)]
    while not soak.over.is_set():
        with contextlib.suppress(OSError), socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(RESPONSE_S)
            client.connect(soak.address)
            path = f"{STORE}/batches/{number}?hook={HOOK}&batch_size={BATCH_ROWS}&seed={number}"
            client.sendall(
                f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
            )
            while not soak.over.wait(0.5) and client.recv(4096):
                pass
        soak.count("slow readers")


def half_heads(soak: Soak, number: int) -> None:
    """Send a head that never ends, a byte at a time."""
    while not soak.over.is_set():
        with contextlib.suppress(OSError), soak.connected() as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            while not soak.over.wait(1 + number % 5):
                client.sendall(b"x")
        soak.count("half heads")


def trailers(soak: Soak, _number: int) -> None:
    """Send trailers without end, and without a token."""
    begin = b"POST /v1/stores/plain/select HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    while not soak.over.is_set():
        with contextlib.suppress(OSError), soak.connected() as client:
            client.sendall(begin)
            while not soak.over.wait(0.02):
                client.sendall(b"x: " + b"y" * 16_000 + b"\r\n")
        soak.count("trailers")


def aborted_bodies(soak: Soak, number: int) -> None:
    """Announce a body that does not come, with and without a valid token."""
    token = HONEST[0] if number % 2 else "nobody"
    while not soak.over.is_set():
        with contextlib.suppress(OSError), soak.connected() as client:
            client.sendall(
                f"POST {STORE}/select HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
                "Content-Type: application/json\r\nContent-Length: 4000000\r\n\r\n".encode()
                + b" " * 300_000
            )
            soak.over.wait(0.5 + number % 3)
        soak.count("aborted bodies")


def wrong_tokens(soak: Soak, number: int) -> None:
    while not soak.over.is_set():
        client = soak.http()
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, _, _ = get(client, "/v1/stores", f"wrong-token-{number}")
            if status not in (401, 503):
                soak.fault(f"a wrong token was answered with {status}")
            soak.count(f"wrong tokens: {status}")
        client.close()
        soak.over.wait(0.1)


def health(soak: Soak, _number: int) -> None:
    """Check health as an orchestrator does, with a new connection each time."""
    while not soak.over.is_set():
        started = time.monotonic()
        client = soak.http()
        try:
            client.request("GET", "/healthz")
            if client.getresponse().status != 200:
                soak.fault("a health check was refused")
        except (OSError, http.client.HTTPException) as error:
            soak.fault(f"a health check failed: {error!r}")
        finally:
            client.close()
        with soak.lock:
            soak.health.append(time.monotonic() - started)
        soak.over.wait(0.5)


CLIENTS: Final[list[tuple[Callable[[Soak, int], None], int]]] = [
    (slices, 64),
    (batches, 2 * N_ORDERS),
    (slow_readers, 16),
    (half_heads, 24),
    (trailers, 16),
    (aborted_bodies, 16),
    (scans, 12),
    (wrong_tokens, 18),
    (health, 2),
]


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[Any]]:
    folder = tmp_path_factory.mktemp("soak")
    return folder, write(LocalBlobs(folder / "plain"), N_ROWS, 8)


@pytest.mark.faults
@pytest.mark.alone
def test_two_hundred_clients_of_every_kind(
    soaked: tuple[Path, NDArray[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, values = soaked
    assert sum(n for _, n in CLIENTS) == 200
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join([*HONEST, *GREEDY]))
    with running(tmp_path, "--root", str(folder), "--token-file", str(tokens)) as server:
        process = psutil.Process(server.process.pid)

        def own_nbytes() -> int:
            # Mapped pages of the store belong to the system, which takes them back.
            memory = process.memory_info()
            return int(memory.rss - memory.shared)

        soak = Soak(server, values)
        client = soak.http()
        for path in (f"{STORE}/hooks/{HOOK}/slice?seq=0", f"{STORE}/batches/0?hook={HOOK}&batch_size=4096"):
            assert get(client, path, HONEST[0])[0] == 200
        before, peak = own_nbytes(), 0
        threads = [
            threading.Thread(target=run, args=(soak, i), daemon=True) for run, n in CLIENTS for i in range(n)
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        while time.monotonic() - started < SOAK_S and not soak.over.wait(0.25):
            peak = max(peak, own_nbytes())
        soak.over.set()
        for thread in threads:
            thread.join(RESPONSE_S + 10)
        assert not [thread for thread in threads if thread.is_alive()]
        assert soak.faults == []
        deadline = time.monotonic() + 120
        after = own_nbytes()
        while after - before > 300 << 20 and time.monotonic() < deadline:
            # What was under way ends in its time, and unused orders are given up after a minute.
            time.sleep(0.5)
            after = own_nbytes()
        with capsys.disabled():
            cuts = statistics.quantiles(soak.latencies, n=100)
            sys.stdout.write(
                f"\nsoak of {SOAK_S:.0f} s: memory {before / 1e6:.0f} MB, at most {peak / 1e6:.0f}, "
                f"after {after / 1e6:.0f}\n"
                f"{len(soak.latencies)} slices: p50 {1e3 * cuts[49]:.0f} ms, p99 {1e3 * cuts[98]:.0f} ms; "
                f"{len(soak.health)} health checks, at most {1e3 * max(soak.health):.0f} ms"
                f"\n{json.dumps(dict(sorted(soak.counts.items())))}\n"
            )
        assert peak < ALLOWED
        assert max(soak.health) < HEALTH_S
        assert len(soak.latencies) > 64 * 5
        assert soak.counts["slices: 200"] > 0.9 * sum(
            n for what, n in soak.counts.items() if what.startswith("slices: ")
        )
        assert after - before < 300 << 20, "memory did not return"
        client.close()  # the connection was idle for too long
        for row in range(0, N_ROWS, N_ROWS // 20):
            _, _, body = get(client, f"{STORE}/hooks/{HOOK}/slice?seq={row}", HONEST[0])
            assert body == values[row].tobytes()
        client.close()

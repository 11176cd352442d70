"""Reading from a server on this machine, compared with a bare one, Arrow Flight, and the local loader."""

import http.client
import itertools
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import torch
from numpy.typing import NDArray

import actstore
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import HookArray, Plan
from actstore.store.records.seal import seal
from tests.benchmarks.loader_store import BATCH, D_MODEL, HOOK, LENGTH, store_at
from tests.benchmarks.measure import Against, Figure, Result, Side, Speed, Work, interleaved
from tests.query.running import Running, running
from tests.store.example import example_plan, write_store

_NBYTES = 64 << 20
_SEQUENCES = _NBYTES // (LENGTH * D_MODEL * 2)
_PROMPTS, _PROMPT, _NARROW = 256, 15, 576
"""Prompts as long as those of indirect objects, as wide as SmolLM2."""
_CLIENTS = 4
_TRAINERS, _TRAINER_PROCESSES = 16, 4
_BESIDE = f"beside {_TRAINERS} busy trainers"
_WAIT_S = 60


def _prompt_plan() -> Plan:
    plan = example_plan("bfloat16", n_sequences=_PROMPTS, n_tokens=_PROMPTS * _PROMPT, segment_size=64)
    tokens = plan.request.tokens.model_copy(update={"context_length": _PROMPT})
    hook = HookArray(name=HOOK, shape=(_NARROW,), axes=("d_model",))
    request = plan.request.model_copy(update={"hooks": (hook,), "tokens": tokens})
    return plan.model_copy(update={"request": request})


def _prompts_at(folder: Path) -> None:
    plan = _prompt_plan()
    values = torch.randn(_PROMPTS, _PROMPT, _NARROW, dtype=torch.bfloat16).view(torch.uint16).numpy()
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, {HOOK: values}, range(plan.n_segments))
    seal(blobs)


@contextmanager
def _process(*command: str) -> Iterator[int]:
    """A server process that prints its port."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        deadline = time.monotonic() + _WAIT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
        yield port
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _downloads(url: str, out: NDArray[np.uint8], n: int = 8) -> Work:
    """The bytes of a client that reads into reused memory."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    started = time.perf_counter()
    for _ in range(n):
        connection.request("GET", f"{parts.path}?{parts.query}")
        reply = connection.getresponse()
        assert reply.status == 200
        left = out.data
        while left.nbytes:
            left = left[reply.readinto(left) :]
    seconds = time.perf_counter() - started
    connection.close()
    return Work(n * out.nbytes, seconds)


def _flight(port: int, n: int = 4) -> Work:
    with flight.connect(f"grpc://127.0.0.1:{port}") as client:
        started = time.perf_counter()
        for _ in range(n):
            table = client.do_get(flight.Ticket(b"")).read_all()
            assert table.num_rows == _SEQUENCES * LENGTH
        return Work(n * _NBYTES, time.perf_counter() - started)


def _loaded(store: actstore.Store, n: int = 64) -> Work:
    with store.loader(HOOK, batch_size=BATCH, epochs=None, seed=1) as loader:
        for _ in range(40):
            next(loader)
        started = time.perf_counter()
        for _ in itertools.islice(loader, n):
            pass
        return Work(n * BATCH * D_MODEL * 2, time.perf_counter() - started)


def _raw(n: int = 64) -> Work:
    """Bytes through two plain sockets of this machine, unprocessed: the most that TCP gives here."""
    with _process("-c", _SENDER) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        out = np.empty(BATCH * D_MODEL * 2, np.uint8)
        started = time.perf_counter()
        connection.sendall(b"x" * n)
        for _ in range(n):
            left = out.data
            while left.nbytes:
                left = left[connection.recv_into(left) :]
        return Work(n * out.nbytes, time.perf_counter() - started)


_SENDER = f"""
import os, socket
data = memoryview(os.urandom({BATCH * D_MODEL * 2}))
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        connection = server.accept()[0]
        for _ in range(len(connection.recv(1000))):
            for start in range(0, len(data), 1 << 18):
                connection.sendall(data[start : start + (1 << 18)])
"""

_BARE = f"""
import os, socket, uvicorn
data = memoryview(os.urandom({_NBYTES}))
head = [(b"content-length", str(len(data)).encode())]
async def app(scope, receive, send):
    await send({{"type": "http.response.start", "status": 200, "headers": head}})
    for start in range(0, len(data), 2 << 20):
        part = data[start : start + (2 << 20)]
        await send({{"type": "http.response.body", "body": part, "more_body": start + len(part) < len(data)}})
with socket.create_server(("127.0.0.1", 0), backlog=100) as at:
    print(at.getsockname()[1], flush=True)
    config = uvicorn.Config(app, http="httptools", loop="uvloop", lifespan="off", log_level="error", access_log=False)
    uvicorn.Server(config).run([at])
"""

_FLIGHT = """
import sys, numpy as np, pyarrow as pa, pyarrow.flight as flight
from tests.benchmarks.bench_query import flight_table
class Server(flight.FlightServerBase):
    def do_get(self, context, ticket):
        return flight.RecordBatchStream(table)
table = flight_table(sys.argv[1])
server = Server("grpc://127.0.0.1:0")
print(server.port, flush=True)
server.serve()
"""


def flight_table(url: str) -> pa.Table:
    """The same bytes as in the slice, one row per position."""
    values = actstore.open(url)[HOOK].rows[:_SEQUENCES]
    flat = pa.array(values.reshape(-1).view(np.float16))
    column = pa.FixedSizeListArray.from_arrays(flat, D_MODEL)
    return pa.table({HOOK: column})


def _latencies(server: Running, n: int = 500) -> tuple[float, float]:
    """p50 and p99 of a prompt through our client, in ms."""
    acts = server.store("prompts", direct=False)[HOOK]
    taken = []
    for number in range(n):
        started = time.perf_counter()
        acts[number % _PROMPTS]
        taken.append(1e3 * (time.perf_counter() - started))
    taken.sort()
    return taken[n // 2], taken[int(0.99 * n)]


@contextmanager
def _busy_trainers(url: str) -> Iterator[None]:
    """Trainers in separate processes that take batches as fast as they can, each in a different order."""
    per_process = _TRAINERS // _TRAINER_PROCESSES
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TRAINER, url, str(first), str(per_process)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in range(0, _TRAINERS, per_process)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "busy\n"
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


_TRAINER = f"""
import sys, threading, actstore
url, first, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
begun = threading.Barrier(n + 1)
def train(seed):
    loader = actstore.open(url, direct=False).loader({HOOK!r}, batch_size={BATCH}, epochs=None, seed=seed)
    next(loader)
    begun.wait()
    for _ in loader:
        pass
for seed in range(first, first + n):
    threading.Thread(target=train, args=(seed,), daemon=True).start()
begun.wait()
print("busy", flush=True)
threading.Event().wait()
"""


def _requests(server: Running, seconds: float = 3.0) -> float:
    """Requests per second of one server process, for clients that do nothing but request and read prompts."""
    address = urlsplit(server.url)
    path = f"/v1/stores/prompts/hooks/{HOOK}/slice?seq={{}}"
    wanted = _PROMPT * _NARROW * 2
    counts = [0] * _CLIENTS
    until = time.perf_counter() + seconds

    def ask(client: int) -> None:
        with socket.create_connection((address.hostname, address.port)) as connection:
            while time.perf_counter() < until:
                target = path.format(counts[client] % _PROMPTS)
                connection.sendall(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
                data = b""
                while b"\r\n\r\n" not in data or len(data) - data.index(b"\r\n\r\n") - 4 < wanted:
                    more = connection.recv(1 << 16)
                    assert more, data
                    data += more
                assert data.startswith(b"HTTP/1.1 200")
                counts[client] += 1

    with ThreadPoolExecutor(_CLIENTS) as threads:
        list(threads.map(ask, range(_CLIENTS)))
    return sum(counts) / seconds


def run(folder: Path, *, repeats: int = 5) -> list[Result]:
    """Measure with server and client on this machine; all files are in the page cache."""
    root = folder / "served"
    store_at(root / "wide")
    _prompts_at(root / "prompts")
    out = np.empty(_NBYTES, np.uint8)
    unix = folder / "socket"
    with (
        running(folder, "--root", str(root), "--uds", str(unix), OMP_NUM_THREADS="2") as server,
        _process("-c", _BARE) as bare,
        _process("-c", _FLIGHT, str(root / "wide")) as flying,
    ):
        url = f"{server.url}/v1/stores/wide/hooks/{HOOK}/slice?seq=0:{_SEQUENCES}"
        stored, served = actstore.open(root / "wide"), server.store("wide", direct=False)
        beside = actstore.open(f"http+unix://{quote(str(unix), safe='')}/v1/stores/wide", direct=False)
        sides: dict[str, Side] = {
            "slice": lambda: _downloads(url, out),
            "bare": lambda: _downloads(f"http://127.0.0.1:{bare}/", out),
            "flight": lambda: _flight(flying),
            "local": lambda: _loaded(stored),
            "served": lambda: _loaded(served),
            "unix": lambda: _loaded(beside),
            "raw": _raw,
        }
        rates = interleaved(sides)
        expected = stored[HOOK].rows[:_SEQUENCES].reshape(-1).view(np.uint8)
        _downloads(url, out, 1)
        assert np.array_equal(out, expected)
        _latencies(server, 100)
        p50, p99 = (
            statistics.median(latencies)
            for latencies in zip(*(_latencies(server) for _ in range(repeats)), strict=True)
        )
        requests = statistics.median(_requests(server) for _ in range(3))
        with _busy_trainers(f"{server.url}/v1/stores/wide"):
            busy_p50, busy_p99 = (
                statistics.median(latencies)
                for latencies in zip(*(_latencies(server) for _ in range(repeats)), strict=True)
            )
    shutil.rmtree(root)
    batches = f"query: batches of {BATCH} x {D_MODEL} bf16"
    uvicorn = Against("bare uvicorn, from memory", rates["bare"], 0.8, is_limit=True)
    sockets = Against("the same bytes over plain TCP sockets", rates["raw"], 0.8, is_limit=True)
    arrow = Against("Arrow Flight do_get", rates["flight"], 1.5)
    local = Against("local loader", rates["local"], 0.3)
    prompt = f"query: one prompt, {_PROMPT} x {_NARROW} bf16"
    return [
        Speed("query: slice of 64 MiB", "GB/s", rates["slice"], (uvicorn, arrow), 1e9),
        Speed(batches, "GB/s", rates["served"], (sockets, local), 1e9),
        Speed(f"{batches}, Unix socket", "GB/s", rates["unix"], (sockets,), 1e9),
        Figure(f"{prompt}, p50", p50, "ms", 2),
        Figure(f"{prompt}, p99", p99, "ms", 10),
        Figure(f"{prompt}, {_BESIDE}, p50", busy_p50, "ms", 10 * p50),
        Figure(f"{prompt}, {_BESIDE}, p99", busy_p99, "ms", 10 * p99),
        Figure("query: prompts a second, one process", requests, "req/s", 500, is_least=True),
    ]

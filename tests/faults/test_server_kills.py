"""Servers are killed, and connections break, while clients go on and get the right bits."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
import pytest

import actstore
from actstore.errors import StorageError
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal
from tests.query.running import Running, running
from tests.query.tcp_proxy import tcp_proxy
from tests.query.test_conformance import bits
from tests.store.example import HOOKS, LENGTH, example_plan, example_values, write_store

pytestmark = pytest.mark.faults

N_ROWS: Final = 4096
N_READERS, N_TRAINERS = 4, 2
N_KILLS: Final = 6
CUT_RATE: Final = 0.2
DEADLINE_S: Final = 120.0
OPTIONS: Final[dict[str, Any]] = {
    "batch_size": 500,
    "shuffle": "window",
    "window_rows": 1024 * LENGTH,
    "seed": 2,
    "epochs": None,
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of 16 shards of three hooks."""
    folder = tmp_path_factory.mktemp("served") / "store"
    plan = example_plan("bfloat16", n_sequences=N_ROWS, n_tokens=N_ROWS * LENGTH, segment_size=N_ROWS // 16)
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    seal(blobs)
    return actstore.open(folder)


class Clients:
    """Threads that read, each with its own store, and compare all values with the files."""

    def __init__(self, url: str, local: Store) -> None:
        self._url = url
        self._local = local
        self._is_over = threading.Event()
        self._counts = [0] * (N_READERS + N_TRAINERS)
        self.stores: list[Store] = []
        with local.loader(HOOKS[0], **OPTIONS) as loader:
            self._epoch = [bits(loader.batch(k)) for k in range(loader.n_batches)]
        self._threads = ThreadPoolExecutor(len(self._counts))
        self._futures: list[Future[None]] = []

    def __enter__(self) -> "Clients":
        for number in range(len(self._counts)):
            store = actstore.open(self._url, direct=False)
            self.stores.append(store)
            work = self._read if number < N_READERS else self._train
            self._futures.append(self._threads.submit(work, store, number))
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._threads.shutdown()

    @property
    def n_retries(self) -> int:
        return sum(store.blobs.n_retries for store in self.stores)

    def go_on(self, n_more: int = 5) -> None:
        """Return once each thread got ``n_more`` more replies.

        Raises:
            Exception: the error of one of the threads.
        """
        goal = [count + n_more for count in self._counts]
        until(
            lambda: all(map(int.__ge__, self._counts, goal)) or any(future.done() for future in self._futures)
        )
        for future in self._futures:
            if future.done():
                future.result()

    def _read(self, store: Store, number: int) -> None:
        draw = random.Random(number)
        while not self._is_over.is_set():
            hook = draw.choice(HOOKS)
            start = draw.randrange(N_ROWS)
            rows: Any = slice(start, start + draw.choice([1, 50, 1000]))
            if draw.random() < 0.3:
                rows = [draw.randrange(N_ROWS) for _ in range(20)]
            values = self._patiently(lambda: store[hook][rows])  # noqa: B023 - called here
            assert bits(values) == bits(self._local[hook][rows]), (hook, rows)
            self._counts[number] += 1

    def _train(self, store: Store, number: int) -> None:
        with store.loader(HOOKS[0], **OPTIONS) as loader:
            for k in itertools.count():
                batch = self._patiently(lambda: next(loader))
                assert bits(batch) == (self._epoch[k] if k < len(self._epoch) else self._later(k)), k
                self._counts[number] += 1
                if self._is_over.is_set():
                    return

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Call again and again, as a user does where the server is away for longer than a client tries."""
        while True:
            try:
                return call()
            except StorageError as error:
                if "tried " not in str(error) or self._is_over.is_set():
                    raise

    def _later(self, k: int) -> Any:
        with self._local.loader(HOOKS[0], **OPTIONS) as loader:
            epoch, number = divmod(k, loader.n_batches)
            return bits(loader.batch(number, epoch))


def workers(server: Running) -> list[int]:
    """Process ids of the workers that are alive."""
    pids = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # or a dead one
            if "spawn_main" in " ".join(child.cmdline()):
                pids.append(child.pid)
    return pids


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.fixture
def two(local: Store, tmp_path: Path) -> Iterator[Running]:
    """A server of two processes."""
    with running(tmp_path, local.url, "--workers", "2") as server:
        until(lambda: len(workers(server)) == 2)
        yield server


def test_a_worker_is_killed(two: Running, local: Store) -> None:
    """Workers are killed again and again; the other one answers, and a new one starts."""
    draw = random.Random(0)
    with Clients(f"{two.url}/v1/stores/store", local) as clients:
        for _ in range(N_KILLS):
            clients.go_on()
            victim = draw.choice(workers(two))
            os.kill(victim, signal.SIGKILL)
            clients.go_on()
            until(lambda: len(workers(two)) == 2 and victim not in workers(two))  # noqa: B023 - called here
    assert two.stop() == 0


def start(port: int, log: Path, url: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start ``actstore serve`` at a port."""
    command = [str(Path(sys.executable).parent / "actstore"), "serve", url, "--port", str(port), *arguments]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_the_server_is_killed_and_comes_again(local: Store, tmp_path: Path, n_workers: int) -> None:
    """It starts at the same port. Its processes end with it, as they would hold the port otherwise."""
    arguments = ("--workers", str(n_workers))
    with running(tmp_path, local.url, *arguments) as first:
        until(lambda: len(workers(first)) == n_workers or n_workers == 1)
        port = urlsplit(first.url).port
        assert port is not None
        second = None
        try:
            with Clients(f"{first.url}/v1/stores/store", local) as clients:
                clients.go_on()
                victims = [psutil.Process(pid) for pid in workers(first)]
                first.process.kill()
                first.process.wait()
                assert psutil.wait_procs(victims, DEADLINE_S)[1] == []
                second = start(port, tmp_path / "second.log", local.url, *arguments)
                clients.go_on(20)
        finally:
            if second is not None:
                second.terminate()
                assert second.wait(DEADLINE_S) == 0
    assert clients.n_retries > 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replies_are_cut(two: Running, local: Store, seed: int) -> None:
    """A fifth of the replies are cut, anywhere in their bodies."""
    with tcp_proxy(two.url) as proxy:
        proxy.seed = seed
        store = actstore.open(f"{proxy.url}/v1/stores/store", direct=False)
        proxy.cut_rate = CUT_RATE
        for hook in HOOKS:
            assert bits(store[hook][:]) == bits(local[hook][:])
        with Clients(f"{proxy.url}/v1/stores/store", local) as clients:
            clients.go_on(60)
        assert proxy.n_cut > 0
        assert clients.n_retries + store.blobs.n_retries >= proxy.n_cut

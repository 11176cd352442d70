"""Scans of all rows take turns, end when nobody waits for them, and do not delay other requests."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import actstore
from actstore.query.problem import Problem
from actstore.query.server.monitoring.metrics import Metrics
from actstore.query.server.sharing.scans import Look, Scans, StoppedError
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import HookArray
from tests.query.running import Running, running
from tests.query.server.test_limits import ask, begun, connected, counters, get, until
from tests.store.example import LENGTH, example_plan, write_store
from tests.store.runs import begin_run

HOOK: Final = "blocks.0.hook_resid_post"
WIDTH: Final = 64
N_SEQUENCES: Final = 40_000
N_ROWS: Final = N_SEQUENCES * LENGTH
"""Rows of 78 MiB: a scan takes some tenths of a second, in 5 pieces."""
ORDER: Final = f"/v1/stores/scanned/batches/0?hook={HOOK}&batch_size=16"
SLICE: Final = f"/v1/stores/scanned/hooks/{HOOK}/slice?seq="
MANY, HONEST = "127.0.0.2", "127.0.0.3"
SCANNED: Final = "actstore_scanned_rows_total"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    plan = example_plan("float32", n_sequences=N_SEQUENCES, n_tokens=N_ROWS, segment_size=N_SEQUENCES // 8)
    hooks = (HookArray(name=HOOK, shape=(WIDTH,), axes=("d_model",)),)
    plan = plan.model_copy(update={"request": plan.request.model_copy(update={"hooks": hooks})})
    blobs = LocalBlobs(root / "scanned")
    draw = np.random.default_rng(0)
    values = draw.standard_normal((N_SEQUENCES, LENGTH, WIDTH), dtype=np.float32)
    write_store(blobs, plan, {HOOK: values}, range(plan.n_segments))  # unfinished, so it has no norms
    return root


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("log"), "--root", str(folder)) as served:
        assert get(served, f"{ORDER}&max_norm=1000")[0] == 200
        yield served


def scanned(server: Running) -> float:
    return counters(server).get(SCANNED, 0.0)


def test_slices_come_while_scans_are_under_way(server: Running) -> None:
    """60 orders of one client, each of other rows: one scan runs at a time, few wait, and none goes on when the client
    has left.
    """
    before = scanned(server)
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(connected(server, source=MANY)) for _ in range(60)]
        for number, connection in enumerate(many):
            ask(connection, f"{ORDER}&max_norm={8 + number / 1000}")
        until(lambda: scanned(server) > before)
        for number in range(20):
            status, _, body = get(server, f"{SLICE}{number}:{number + 1}", source=HONEST)
            assert (status, len(body)) == (200, LENGTH * WIDTH * 4)
        # 1 runs and 8 wait, the last of which have not begun yet.
        assert scanned(server) - before < 8 * N_ROWS
    last, since = scanned(server), time.monotonic()
    while time.monotonic() - since < 0.5:
        if scanned(server) != last:
            last, since = scanned(server), time.monotonic()
    assert last - before < 8 * N_ROWS
    assert get(server, f"{ORDER}&max_norm=8.5", source=HONEST)[0] == 200


def test_too_many_scans_of_a_client(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(connected(server, source=MANY)) for _ in range(20)]
        for number, connection in enumerate(many):
            ask(connection, f"{ORDER}&max_norm={7 + number / 1000}")
        # The scan of another client does not wait behind them.
        assert get(server, f"{ORDER}&max_norm=6.5", source=HONEST)[0] == 200
        heads = [begun(connection) for connection in many]
    refused = [head.decode() for status, head in heads if status == 429]
    assert {status for status, _ in heads} == {200, 429}
    assert len(refused) == 11
    assert all("retry-after: " in head for head in refused)


def test_orders_that_drop_the_same_share_a_scan(server: Running) -> None:
    before = scanned(server)
    barrier = threading.Barrier(8)

    def order(seed: int) -> int:
        barrier.wait()
        return get(server, f"{ORDER}&max_norm=9&seed={seed}")[0]

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(order, range(8))) == {200}
    assert scanned(server) - before == N_ROWS
    # Later, too, as long as one of the orders exists.
    assert order_rows(server, "&max_norm=9&seed=9") < N_ROWS
    assert scanned(server) - before == N_ROWS


def order_rows(server: Running, options: str) -> int:
    status, _, body = get(server, ORDER.replace("/batches/0", "/batches") + options)
    assert status == 200
    n_rows: int = json.loads(body)["n_rows"]
    return n_rows


def test_a_scan_that_takes_too_long_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    """Otherwise it would never end; and it stands still while nobody waits."""
    with running(tmp_path, "--root", str(folder), "--timeout", "0.1") as server:
        until(lambda: get(server, f"{SLICE}0:1")[0] == 200)
        until(lambda: get(server, ORDER)[0] == 200)  # torch is loaded for the first order
        assert scanned(server) == 0
        statuses: list[int] = []
        while 200 not in statuses:
            statuses.append(get(server, f"{ORDER}&max_norm=8")[0])
            assert len(statuses) < 100
        assert set(statuses) == {200, 503}
        until(lambda: get(server, f"{ORDER}&max_norm=8&seed=1")[0] == 200)
        until(lambda: scanned(server) == N_ROWS)
        store = actstore.open(folder / "scanned")
        with store.loader(HOOK, batch_size=16, max_norm=8) as loader:
            assert order_rows(server, "&max_norm=8") == loader.n_rows


def test_the_rows_are_those_of_a_loader(server: Running, folder: Path) -> None:
    options: dict[str, Any] = {"batch_size": 16, "max_norm": 8, "seed": 3, "drop": ["pad", 5]}
    with (
        actstore.open(folder / "scanned").loader(HOOK, **options) as local,
        server.store("scanned", direct=False).loader(HOOK, **options) as served,
    ):
        assert served.n_rows == local.n_rows
        np.testing.assert_array_equal(next(served).numpy(), next(local).numpy())


def test_statistics_of_a_store_that_grows(folder: Path, server: Running) -> None:
    before = scanned(server)
    status, _, body = get(server, f"/v1/stores/scanned/hooks/{HOOK}/stats")
    assert status == 200
    assert json.loads(body)["summary"]["count"] == N_ROWS
    assert scanned(server) - before == N_ROWS


def test_searches_take_their_turn(tmp_path: Path) -> None:
    """The tokens are more than one piece."""
    n = (5 << 20) // LENGTH
    plan = example_plan(n_sequences=n, n_tokens=n * LENGTH, segment_size=n)
    begin_run(LocalBlobs(tmp_path / "searched"), plan)
    with running(tmp_path, "--root", str(tmp_path)) as server:
        path = "/v1/stores/searched/prompts?tokens="
        status, _, body = get(server, f"{path}{n * LENGTH - 1}")
        assert status == 200
        assert json.loads(body) == {"sequences": [n - 1], "positions": [LENGTH - 1]}
        assert scanned(server) == n
        with contextlib.ExitStack() as stack:
            many = [stack.enter_context(connected(server, source=MANY)) for _ in range(20)]
            for number, connection in enumerate(many):
                ask(connection, f"{path}{number}")
            assert {begun(connection)[0] for connection in many} <= {200, 429}
        assert get(server, f"{path}0", source=HONEST)[0] == 200


class Waiting:
    """A request whose client leaves at a signal, or never."""

    def __init__(self, leaves: asyncio.Event | None) -> None:
        self._leaves = leaves or asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self._leaves.wait()
        return {"type": "http.disconnect"}


@pytest.mark.parametrize("n_others", [0, 1])
def test_a_scan_that_nobody_waits_for_ends(n_others: int) -> None:
    """It ends at its next piece; a scan that another client waits for goes on."""
    stopped, may_end = threading.Event(), threading.Event()

    def work(look: Look) -> str:
        try:
            while not may_end.wait(0.001):
                look(1)
        except StoppedError:
            stopped.set()
            raise
        return "found"

    async def leave() -> list[Any]:
        scans, leaves = Scans(1, 60.0, Metrics()), asyncio.Event()
        requests: list[Any] = [Waiting(leaves), *(Waiting(None) for _ in range(n_others))]
        try:
            waiting = [asyncio.create_task(scans.run(request, "client", "key", work)) for request in requests]
            await asyncio.sleep(0)
            leaves.set()
            with pytest.raises(Problem, match="the client has left"):
                await waiting[0]
            if not n_others:
                assert await asyncio.to_thread(stopped.wait, 20)
            may_end.set()
            return await asyncio.gather(*waiting[1:])
        finally:
            may_end.set()
            await asyncio.to_thread(scans.close)

    assert asyncio.run(leave()) == ["found"] * n_others
    assert stopped.is_set() == (not n_others)

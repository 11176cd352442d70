"""The memory of a server stays within its budget, whatever clients request, and others are served meanwhile."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from actstore.storage.local import LocalBlobs
from actstore.store.format.compression import Compression
from actstore.store.format.plan import HookArray
from actstore.store.records.seal import seal
from tests.query.running import Running, running
from tests.query.server.test_limits import ask, begun, connected, counters, get, until
from tests.store.example import LENGTH, example_plan, example_values, write_store

HOOK: Final = "blocks.0.hook_resid_post"
WIDTH: Final = 1024
ROW_NBYTES: Final = WIDTH * 4
MIB: Final = 1 << 20
BUDGET: Final = 64 * MIB
MADE: Final = "&dtype=float64"
"""A type other than the stored one, so that batches are made; others are sent from where their rows lie."""
BATCH: Final = 16 * MIB // (8 * WIDTH)
"""Rows of a made batch of 16 MiB: with what it is made from, two clients can have one in use each."""
MARGIN: Final = 24 * MIB
"""Bytes that Python, its threads and the heap take in addition, and for a moment."""
SLOW, HONEST, OTHER = "127.0.0.2", "127.0.0.3", "127.0.0.4"


def write(folder: Path, nbytes: int, n_shards: int, compression: Compression | None = None) -> None:
    n_rows = nbytes // ROW_NBYTES // LENGTH
    plan = example_plan(
        "float32", compression, n_sequences=n_rows, n_tokens=n_rows * LENGTH, segment_size=n_rows // n_shards
    )
    hooks = (HookArray(name=HOOK, shape=(WIDTH,), axes=("d_model",)),)
    plan = plan.model_copy(update={"request": plan.request.model_copy(update={"hooks": hooks})})
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    seal(blobs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores: ``plain`` of 64 MiB; ``packed`` of 12 MiB and ``large`` of 48 MiB are compressed."""
    root = tmp_path_factory.mktemp("stores")
    write(root / "plain", 64 * MIB, 4)
    write(root / "packed", 12 * MIB, 3, "lz4")
    write(root / "large", 48 * MIB, 12, "lz4")
    return root


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("log"), "--root", str(folder), "--memory", str(BUDGET)) as served:
        # Libraries are loaded, and threads started, when they are first needed.
        for name in ("plain", "packed"):
            assert get(served, f"/v1/stores/{name}/hooks/{HOOK}/slice?seq=0:8")[0] == 200
            assert get(served, f"{batch(name)}&batch_size=8&shuffle=window")[0] == 200
        yield served


@pytest.fixture(scope="module")
def memory(server: Running) -> "Memory":
    return Memory(server)


def batch(name: str, k: int = 0) -> str:
    return f"/v1/stores/{name}/batches/{k}?hook={HOOK}"


def slice_of(name: str, rows: str) -> str:
    return f"/v1/stores/{name}/hooks/{HOOK}/slice?seq={rows}"


class Memory:
    """Anonymous memory of a server, without mapped files."""

    def __init__(self, server: Running) -> None:
        self._status = Path(f"/proc/{server.process.pid}/status")
        self._before = self._nbytes()

    def _nbytes(self) -> int:
        match = re.search(r"RssAnon:\s+([0-9]+) kB", self._status.read_text())
        assert match is not None
        return int(match[1]) << 10

    @property
    def growth(self) -> int:
        """Bytes that it grew by since the first measurement."""
        return self._nbytes() - self._before


def test_many_orders_of_large_batches(server: Running, memory: Memory) -> None:
    """28 batches of 16 MiB, of 14 orders: all are given, and most of them are not kept."""
    for seed in range(14):
        for k in (0, 1):
            status, _, body = get(server, f"{batch('plain', k)}{MADE}&batch_size={BATCH}&seed={seed}")
            assert (status, len(body)) == (200, 16 * MIB)
            assert memory.growth < BUDGET + MARGIN
    assert memory.growth > BUDGET // 4  # or nothing was measured
    assert counters(server)["actstore_memory_bytes"] <= BUDGET


def test_of_many_orders_at_once_one_is_given(server: Running) -> None:
    """Two of them fit the share of a client as long as no batch of them is made; then none could be given."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server, source=OTHER)) for _ in range(16)]
        for seed, connection in enumerate(clients):
            ask(connection, f"{batch('plain')}{MADE}&batch_size={BATCH}&seed={1000 + seed}")
        assert 200 in {begun(connection)[0] for connection in clients}


def test_batches_that_are_not_made_take_no_memory(server: Running, memory: Memory) -> None:
    """They take no memory from others either: larger ones are given than would fit."""
    before = memory.growth
    for seed in range(4):
        status, _, body = get(server, f"{batch('plain')}&batch_size={8 * BATCH}&seed={seed}")
        assert (status, len(body)) == (200, 64 * MIB)
        assert memory.growth < before + 8 * MIB


def test_many_orders_of_one_huge_window(server: Running, memory: Memory) -> None:
    for seed in range(16):
        path = f"{batch('packed')}&batch_size=256&seed={seed}&shuffle=window&window_rows={1 << 48}"
        assert get(server, path)[0] == 200
        assert memory.growth < BUDGET + MARGIN


def test_a_window_that_never_fits(server: Running, memory: Memory) -> None:
    """It is refused before anything is read, and the error names what fits."""
    url = f"{batch('large')}&batch_size=256&shuffle=window"
    for wanted in ("", f"&window_rows={1 << 48}"):
        status, _, body = get(server, url + wanted)
        problem = json.loads(body)
        assert (status, problem["type"]) == (413, "urn:actstore:problem:too-large")
        assert "--memory" in problem["detail"]
        fits = re.search(r"window_rows=([0-9]+) or less", problem["detail"])
        assert fits is not None
        assert get(server, f"{url}&window_rows={fits[1]}")[0] == 200
    assert memory.growth < BUDGET + MARGIN


def test_a_server_with_too_little_memory_for_any_batch(folder: Path, tmp_path: Path) -> None:
    """The error names how much is enough, and that is enough."""
    path = f"{batch('plain')}{MADE}&batch_size=1"
    with running(tmp_path, "--root", str(folder), "--memory", str(4 * MIB)) as small:
        status, _, body = get(small, path)
    detail = json.loads(body)["detail"]
    assert (status, "batch_size" in detail, "windows" in detail) == (413, False, False)
    enough = re.search(r"--memory ([0-9]+) or more", detail)
    assert enough is not None
    with running(tmp_path, "--root", str(folder), "--memory", enough[1]) as server:
        assert get(server, path)[0] == 200


def test_a_batch_that_never_fits(server: Running) -> None:
    status, _, body = get(server, f"{batch('plain')}{MADE}&batch_size={2 * BATCH}")
    problem = json.loads(body)
    assert (status, problem["type"]) == (413, "urn:actstore:problem:too-large")
    fits = re.search(r"batch_size=([0-9]+) or less", problem["detail"])
    assert fits is not None
    assert get(server, f"{batch('plain')}{MADE}&batch_size={fits[1]}")[0] == 200


LARGE_REPLIES: Final = pytest.mark.parametrize(
    "path",
    [
        batch("plain") + f"{MADE}&batch_size={BATCH}&seed=",
        slice_of("packed", "0:380") + "&format=raw",
        slice_of("packed", "0:380") + "&format=arrow",
    ],
    ids=["batches", "compressed", "made"],
)
"""Requests whose replies hold memory in different ways; those for batches are formatted with a seed."""


@LARGE_REPLIES
def test_slow_readers(server: Running, memory: Memory, path: str) -> None:
    """16 readers of one client, each with a different request: some must ask again; others are served as ever."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(server, source=SLOW, receives=4096)) for _ in range(16)]
        for seed, connection in enumerate(slow):
            ask(connection, path + (str(seed) if path.endswith("seed=") else ""))
        heads = [begun(connection) for connection in slow]
        assert {status for status, _ in heads} == {200, 503}
        for status, head in heads:
            later = re.search(rb"retry-after: ([0-9]+)", head)
            assert (later is not None) == (status == 503)
            assert later is None or 1 <= int(later[1]) <= 30
        for number in range(20):
            assert get(server, slice_of("packed", f"{number}:{number + 1}"), source=HONEST)[0] == 200
            assert get(server, slice_of("plain", f"{number}:{number + 1}"), source=HONEST)[0] == 200
        for seed in range(100, 104):
            assert (
                get(server, f"{batch('plain')}{MADE}&batch_size={BATCH}&seed={seed}", source=OTHER)[0] == 200
            )
            assert memory.growth < BUDGET + MARGIN
    # Clients that left hold no memory any more.
    until(lambda: get(server, f"{batch('plain')}{MADE}&batch_size={BATCH}&seed=7", source=SLOW)[0] == 200)
    assert memory.growth < BUDGET + MARGIN


@LARGE_REPLIES
def test_readers_that_are_cut_off_hold_nothing(folder: Path, tmp_path: Path, path: str) -> None:
    """Nor do errors that describe it: the clients stay connected, and others can use the memory."""
    arguments = ["--root", str(folder), "--memory", str(BUDGET), "--stall", "0.5"]
    with running(tmp_path, *arguments) as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(server, source=SLOW, receives=4096)) for _ in range(4)]
        for seed, connection in enumerate(slow):
            ask(connection, path + (str(seed) if path.endswith("seed=") else ""))
        assert 200 in {begun(connection)[0] for connection in slow}
        until(lambda: "was cut off" in server.log.read_text())
        wanted = f"{batch('plain')}{MADE}&batch_size={BATCH}&seed=7"
        until(lambda: get(server, wanted, source=SLOW)[0] == 200)


def test_replies_without_a_body_hold_nothing(server: Running) -> None:
    """Replies made in memory that have no body: not modified, a range that does not exist, and too large."""
    path = slice_of("packed", "0:200") + "&format=arrow"
    status, head, _ = get(server, path, source=HONEST)
    assert status == 200
    held = counters(server)["actstore_memory_bytes"]
    for _ in range(4):
        known = {"If-None-Match": head["ETag"]}
        assert get(server, path, source=HONEST, headers=known)[0] == 304
        assert get(server, path, source=HONEST, headers={"Range": "bytes=99999999-"})[0] == 416
        assert get(server, slice_of("large", ":") + "&format=arrow", source=HONEST)[0] == 413
    assert counters(server)["actstore_memory_bytes"] <= held


def test_memory_is_given_back(server: Running, memory: Memory) -> None:
    """Memory for other processes is not only free within Python, but given back to the system."""
    for seed in range(3):
        assert get(server, f"{batch('plain')}{MADE}&batch_size={BATCH}&seed={seed}")[0] == 200
    before = memory.growth
    # Orders that take less memory than they are counted for.
    for seed in range(8):
        assert get(server, f"{batch('plain')}{MADE}&batch_size=1&seed={seed}")[0] == 200
    assert memory.growth < before - 12 * MIB


def test_one_client_gives_up_its_own_orders_first(server: Running) -> None:
    """Otherwise a client with many orders would take those of others, who come seldom."""
    path = f"{batch('packed')}&batch_size=256&seed=1&shuffle=window"
    assert get(server, path, source=HONEST)[0] == 200
    before = counters(server)
    for seed in range(8):
        assert get(server, f"{batch('plain')}{MADE}&batch_size={BATCH}&seed={seed}", source=OTHER)[0] == 200
    made = counters(server)["actstore_batches_made_total"]
    assert made == before["actstore_batches_made_total"] + 8
    assert get(server, path, source=HONEST)[0] == 200
    after = counters(server)
    assert after["actstore_batches_made_total"] == made
    assert after["actstore_batches_shared_total"] == before.get("actstore_batches_shared_total", 0) + 1

"""Batches sent from where their rows lie have the same bytes, whatever happens to files, orders and clients."""

import asyncio
import contextlib
import mmap
import os
import random
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

import actstore
from actstore.loader.batches.batch import Batch
from actstore.loader.batches.lent_rows import can_lend
from actstore.loader.options import options_of
from actstore.query.server.app import create_app
from actstore.query.server.settings import Settings
from actstore.query.server.sharing.shared_batches import MOST_AT_ONCE
from actstore.query.wire import N_HERE
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import HookArray
from actstore.store.records.seal import seal
from tests.query.running import Running, running
from tests.query.server.test_limits import ask, begun, connected, get, rest
from tests.store.example import example_plan, write_store

CLIENT: Final = "127.0.0.1"
HOOK: Final = "blocks.0.hook_resid_post"
OTHER: Final = "blocks.1.hook_resid_post"
LENGTH: Final = 16
D_MODEL: Final = 512
N_SEQUENCES: Final = 1024
SEGMENT: Final = 256
SHARD_NBYTES: Final = SEGMENT * LENGTH * D_MODEL * 4
"""Bytes of the rows of a shard, which an index follows."""
BATCH: Final = 1024
"""Rows of 2 KiB: 16 batches of 2 MiB."""
NBYTES: Final = BATCH * D_MODEL * 4
ORDER: Final = f"hook={HOOK}&batch_size={BATCH}&seed=7"


def write(
    folder: Path,
    names: tuple[str, ...] = (HOOK, OTHER),
    d_model: int = D_MODEL,
    n_sequences: int = N_SEQUENCES,
    length: int = LENGTH,
) -> dict[str, NDArray[Any]]:
    """Write a store of hooks, and return their values."""
    hooks = tuple(HookArray(name=name, shape=(d_model,), axes=("d_model",)) for name in names)
    segment = min(SEGMENT, n_sequences)
    plan = example_plan(n_sequences=n_sequences, n_tokens=n_sequences * length, segment_size=segment)
    tokens = plan.request.tokens.model_copy(update={"context_length": length})
    request = plan.request.model_copy(update={"hooks": hooks, "tokens": tokens})
    plan = plan.model_copy(update={"request": request})
    rng = np.random.default_rng(0)
    values = {hook.name: rng.random((n_sequences, length, d_model), np.float32) for hook in hooks}
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write(folder / "wide")
    return folder


@pytest.fixture(scope="module")
def expected(root: Path) -> bytes:
    """All batches of an epoch of `ORDER`, as the files give them."""
    store = actstore.open(root / "wide")
    # Otherwise these tests would not test lent batches.
    assert can_lend(store, options_of(store, HOOK, batch_size=BATCH, seed=7))
    with store.loader(HOOK, batch_size=BATCH, seed=7, provenance=True) as loader:
        places = [(batch.sequences.numpy(), batch.positions.numpy()) for batch in loader]
    values = store[HOOK].rows[:]
    return b"".join(values[sequences, positions].tobytes() for sequences, positions in places)


@pytest.fixture(scope="module")
def wide(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("log"), "--root", str(root)) as server:
        yield server


def path_of(k: int, count: int = 1, order: str = ORDER) -> str:
    return f"/v1/stores/wide/batches/{k}?{order}&count={count}"


@pytest.mark.parametrize(("k", "count", "n"), [(0, 1, 1), (3, 5, 5), (14, 9, 2), (0, 64, 16)])
def test_batches_in_one_reply(wide: Running, expected: bytes, k: int, count: int, n: int) -> None:
    """A reply has as many batches as requested, or as there are."""
    status, headers, body = get(wide, path_of(k, count))
    assert (status, headers[N_HERE]) == (200, str(n))
    assert headers["Actstore-Shape"] == f"{n * BATCH},{D_MODEL}"
    assert body == expected[k * NBYTES : (k + n) * NBYTES]


def test_batches_in_one_reply_are_bounded(root: Path, expected: bytes, tmp_path: Path) -> None:
    """``--max-batch`` limits the bytes of the batches in one reply."""
    with running(tmp_path, "--root", str(root), "--max-batch", str(3 * NBYTES)) as server:
        _, headers, body = get(server, path_of(2, 16))
        assert headers[N_HERE] == "3"
        assert body == expected[2 * NBYTES : 5 * NBYTES]


@pytest.mark.parametrize("count", [1, 3])
def test_parts_of_ranks(wide: Running, expected: bytes, count: int) -> None:
    """A rank gets its rows of each batch, also of several batches in one reply."""
    parts = []
    for rank in range(3):
        _, _, body = get(wide, path_of(4, count, f"{ORDER}&rank={rank}&world_size=3"))
        rows = np.frombuffer(body, np.float32).reshape(-1, D_MODEL)
        parts.append(np.array_split(rows, count))
    whole = np.concatenate([parts[rank][number] for number in range(count) for rank in range(3)])
    assert whole.tobytes() == expected[4 * NBYTES : (4 + count) * NBYTES]


def test_a_last_batch_of_ranks(wide: Running, root: Path) -> None:
    """It is smaller, and comes in one reply with the one before it; some ranks have no row of it."""
    store, size = actstore.open(root / "wide"), 1023
    n_batches = -(-N_SEQUENCES * LENGTH // size)
    for rank in range(32):
        with store.loader(HOOK, batch_size=size, seed=7, rank=rank, world_size=32) as loader:
            wanted = [np.asarray(loader.batch(k)).tobytes() for k in (n_batches - 2, n_batches - 1)]
        order = f"hook={HOOK}&batch_size={size}&seed=7&rank={rank}&world_size=32"
        assert get(wide, path_of(n_batches - 2, 2, order))[2] == b"".join(wanted)
        assert get(wide, path_of(n_batches - 1, 1, order))[2] == wanted[1]


def test_ranges(wide: Running, expected: bytes) -> None:
    draw = random.Random(3)
    whole = expected[NBYTES : 3 * NBYTES]
    for _ in range(20):
        start, stop = sorted(draw.sample(range(len(whole)), 2))
        status, _, body = get(wide, path_of(1, 2), headers={"Range": f"bytes={start}-{stop - 1}"})
        assert status == 206
        assert body == whole[start:stop]


def test_several_hooks(wide: Running, root: Path) -> None:
    local = actstore.open(root / "wide")
    options: dict[str, Any] = {"batch_size": BATCH, "seed": 7}
    with (
        local.loader([HOOK, OTHER], **options) as files,
        wide.store("wide", direct=False).loader([HOOK, OTHER], **options) as served,
    ):
        for mine, theirs in zip(served, files, strict=True):
            assert isinstance(mine, dict)
            assert isinstance(theirs, dict)
            assert all(torch.equal(mine[hook], theirs[hook]) for hook in (HOOK, OTHER))


def test_a_loader_that_goes_elsewhere(wide: Running, expected: bytes) -> None:
    """It requests several batches at once; each batch that it then wants is the right one, wherever it goes."""
    draw = random.Random(5)
    with wide.store("wide", direct=False).loader(HOOK, batch_size=BATCH, seed=7, prefetch=1) as loader:
        for _ in range(12):
            k = draw.randrange(loader.n_batches)
            loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": k})
            for number in range(k, min(k + draw.randrange(1, 7), loader.n_batches)):
                batch = next(loader)
                assert isinstance(batch, torch.Tensor)
                assert batch.numpy().tobytes() == expected[number * NBYTES : (number + 1) * NBYTES]


def test_batches_that_are_small_and_many(wide: Running, root: Path) -> None:
    """The loader requests more of them at once than one reply can have."""
    options: dict[str, Any] = {"batch_size": 8, "seed": 3}
    local = actstore.open(root / "wide")
    with (
        wide.store("wide", direct=False).loader(HOOK, **options) as served,
        local.loader(HOOK, **options) as files,
    ):
        assert served.n_batches > MOST_AT_ONCE
        for number in (0, MOST_AT_ONCE, served.n_batches - 1):
            served.load_state_dict({**served.state_dict(), "epoch": 0, "batch": number})
            assert np.array_equal(np.asarray(next(served)), np.asarray(files.batch(number)))


def test_an_error_says_which_store_and_not_where_it_is(wide: Running, root: Path) -> None:
    """This also holds for a store that was used a moment ago, for which nothing is read."""
    _, headers, _ = get(wide, path_of(0))
    for hook in ("blocks.9.hook_resid_post", "blocks.0"):
        status, head, body = get(wide, path_of(0, 1, f"hook={hook}&batch_size={BATCH}"))
        assert status == 404
        assert b"the store wide" in body
        assert str(root).encode() not in body
        assert head["Actstore-Store"] == headers["Actstore-Store"]


def test_long_rows(tmp_path: Path) -> None:
    """The last row is copied before it is sent, which counts as memory of the client."""
    d_model = 4 << 20
    values = write(tmp_path / "wide", (HOOK,), d_model, n_sequences=2, length=2)[HOOK]
    rows = values.reshape(-1, d_model)
    path = path_of(1, 1, f"hook={HOOK}&batch_size=2&shuffle=none")
    for memory, expected in ((40 << 20, 413), (80 << 20, 200)):
        with running(tmp_path, "--root", str(tmp_path), "--memory", str(memory)) as server:
            status, _, body = get(server, path)
            assert status == expected
            if status == 413:
                assert b"this reply takes" in body
                continue
            assert body == rows[2:].tobytes()
            start = len(body) // 2 - 10
            assert get(server, path, headers={"Range": f"bytes={start}-"})[2] == body[start:]


def test_the_loop_waits_for_no_memory(root: Path, expected: bytes) -> None:
    """A reply that needs memory of others waits in a thread: meanwhile the loop goes on, and here nothing else gives
    that memory up.
    """
    application = create_app(Settings(root=str(root)))
    budget = application._budget
    is_asked = threading.Event()

    async def answered() -> tuple[int, bytes]:
        sent: list[tuple[int | None, bytes]] = []

        async def send(message: Any) -> None:
            sent.append((message.get("status"), bytes(message.get("body", b""))))

        path, _, query = path_of(0).partition("?")
        scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
        await application({**scope, "client": (CLIENT, 1)}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        status = sent[0][0]
        assert status is not None
        return status, b"".join(body for _, body in sent)

    async def both() -> tuple[int, bytes]:
        # This opens the order, with the memory that it takes.
        assert await answered() == (200, expected[:NBYTES])
        others = budget.account(CLIENT, is_asked.set)
        others.grow(budget.limit - budget.held)
        others.leave()
        reply = asyncio.create_task(answered())
        await asyncio.to_thread(is_asked.wait, 60)
        others.close()
        return await reply

    assert asyncio.run(both()) == (200, expected[:NBYTES])


def whole_of(connection: socket.socket) -> tuple[int, bytes]:
    """Announced length, and the body as far as it came."""
    status, data = begun(connection)
    assert status == 200
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length is not None
    return int(length[1]), body + rest(connection)


@pytest.mark.parametrize(
    "left",
    [0, 4096 * 50, SHARD_NBYTES - 5000, SHARD_NBYTES - 10, SHARD_NBYTES + 10],
    ids=["all", "most", "a page", "some bytes", "none of its rows"],
)
def test_a_file_that_becomes_shorter_on_the_way(tmp_path: Path, left: int) -> None:
    """A file is truncated when the client has a part of a batch. No whole reply has other bytes than were stored."""
    write(tmp_path / "wide")
    n_rows = N_SEQUENCES * LENGTH
    with actstore.open(tmp_path / "wide").loader(HOOK, batch_size=n_rows, seed=7, provenance=True) as loader:
        batch = next(loader)
    assert isinstance(batch, Batch)
    wanted = np.asarray(batch.values).tobytes()
    # Not the file of the last row, which is checked when that is copied; its end is sent late.
    places = torch.argsort(batch.sequences * LENGTH + batch.positions)
    last = int(batch.sequences[-1]) // SEGMENT
    ends = {
        int(places[(n + 1) * SEGMENT * LENGTH - 1]): n for n in range(N_SEQUENCES // SEGMENT) if n != last
    }
    assert max(ends) > n_rows // 4
    shard = tmp_path / "wide" / "acts" / HOOK / f"c.{ends[max(ends)]}.0.0"
    path = path_of(0, 1, f"hook={HOOK}&batch_size={n_rows}&seed=7")
    with (
        running(tmp_path, "--root", str(tmp_path), "--max-batch", str(64 << 20)) as server,
        connected(server, receives=1 << 16) as connection,
    ):
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(1 << 12, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        os.truncate(shard, left)
        length, body = whole_of(connection)
        assert length == len(wanted)
        assert len(body) < length or body == wanted
        # The next request gets an error if rows are gone.
        assert get(server, path)[0] == (502 if left < SHARD_NBYTES else 200)
        assert get(server, "/healthz")[0] == 200


def test_a_slice_of_a_file_that_loses_its_last_page_on_the_way(tmp_path: Path) -> None:
    """Its last bytes, which are sent after all others, are alone in it. The reply is cut off, and the server lives."""
    n = (8 << 20) // 32 + 1
    write(tmp_path / "wide", (HOOK,), 8, n_sequences=1, length=n)
    shard = max(
        (file for file in (tmp_path / "wide" / "acts" / HOOK).rglob("*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )
    with running(tmp_path, "--root", str(tmp_path)) as server, connected(server, receives=1 << 16) as client:
        path = f"/v1/stores/wide/hooks/{HOOK}/slice"
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert client.recv(1 << 12, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        os.truncate(shard, n * 32 // mmap.PAGESIZE * mmap.PAGESIZE)
        length, body = whole_of(client)
        assert length == n * 32
        assert len(body) < length
        assert get(server, "/healthz")[0] == 200


def test_an_order_that_is_given_up_on_the_way(root: Path, expected: bytes, tmp_path: Path) -> None:
    """Its rows stay mapped for a slow client, while other orders take its memory."""
    with (
        running(tmp_path, "--root", str(root), "--memory", str(48 << 20)) as server,
        connected(server, receives=1 << 16) as slow,
    ):
        slow.sendall(
            f"GET {path_of(0, 16)} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert slow.recv(1 << 12, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        for seed in range(20):
            assert get(server, path_of(0, 1, f"hook={HOOK}&batch_size={BATCH}&seed={seed}"))[0] == 200
        length, body = whole_of(slow)
        assert (length, len(body)) == (len(expected), len(expected))
        assert body == expected


def test_many_slow_clients_hold_nobody_up(wide: Running, expected: bytes) -> None:
    """There are far more than threads that write; then they leave, and their descriptors are closed."""
    process = psutil.Process(wide.process.pid)
    assert get(wide, path_of(0, 2))[0] == 200
    before = process.num_fds()
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(connected(wide, source=f"127.0.0.{2 + n % 9}", receives=1 << 16))
            for n in range(60)
        ]
        for connection in slow:
            ask(connection, path_of(0, 16))
        with ThreadPoolExecutor(4) as threads:
            bodies = list(threads.map(lambda k: get(wide, path_of(k, 2))[2], range(4)))
        assert bodies == [expected[k * NBYTES : (k + 2) * NBYTES] for k in range(4)]
    event = threading.Event()
    while process.num_fds() > before:
        assert not event.wait(0.01)

"""A server under the load of 64 connections has no errors, and its memory does not grow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest

from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal
from tests.query.load import N_CONNECTIONS, load
from tests.query.running import Running, running
from tests.store.example import LENGTH, example_plan, example_values, write_store

MAX_GROWTH: Final = 32 << 20
"""Bytes that all processes together may grow by, from after a warm-up of 5 s until the end."""
MAX_GROWTH_WARMING: Final = 128 << 20
"""Bytes of growth from after one second on, while threads still begin."""
N_ROWS: Final = 4096


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a store with 16 shards of each of 3 hooks."""
    folder = tmp_path_factory.mktemp("load")
    plan = example_plan("bfloat16", n_sequences=N_ROWS, n_tokens=N_ROWS * LENGTH, segment_size=N_ROWS // 16)
    blobs = LocalBlobs(folder / "store")
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    seal(blobs)
    with running(folder, str(Path(blobs.url)), "--workers", str(request.param)) as served:
        yield served


def rss(server: Running) -> int:
    """Resident bytes of all processes of a server."""
    process = psutil.Process(server.process.pid)
    return sum(member.memory_info().rss for member in (process, *process.children(recursive=True)))


def check(server: Running, seconds: float, allowed: int) -> None:
    """Load a server after a warm-up, with wrk where it is installed, and print the figures."""
    url = f"{server.url}/v1/stores/store"
    assert load(url, max(1.0, seconds / 6)).n_errors == 0
    before = rss(server)
    result = load(url, seconds)
    after = rss(server)
    print(  # noqa: T201 - the figures are the output
        f"{result.n:,} requests, {result.per_second:,.0f} a second, p50 {result.p50_ms:.1f} ms, "
        f"p99 {result.p99_ms:.1f} ms, {result.n_errors} errors, "
        f"{before / 1e6:,.0f} MB before, {after / 1e6:,.0f} MB after"
    )
    assert result.n_errors == 0
    assert result.n > 10 * N_CONNECTIONS
    assert after - before <= allowed


@pytest.mark.faults
def test_for_a_moment(server: Running) -> None:
    check(server, 3, MAX_GROWTH_WARMING)


@pytest.mark.soak
def test_for_half_a_minute(server: Running) -> None:
    check(server, 30, MAX_GROWTH)

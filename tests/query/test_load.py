"""A server under the load of 64 connections: no error, and no memory that grows."""

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
"""Bytes of all processes together, from after a warm-up of 5 s until the end."""
MAX_GROWTH_WARMING: Final = 128 << 20
"""The same after a second, while threads still begin."""
N_ROWS: Final = 4096


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.faults), 2],
    ids=["one process", "two processes"],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a store with 16 shards of each of 3 hooks."""
    folder = tmp_path_factory.mktemp("load")
    plan = example_plan("bfloat16", n_sequences=N_ROWS, n_tokens=N_ROWS * LENGTH, segment_size=N_ROWS // 16)
    blobs = LocalBlobs(folder / "store")
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    seal(blobs)
    with running(folder, str(Path(blobs.url)), "--workers", str(request.param)) as found:
        yield found


def rss(server: Running) -> int:
    """Of all its processes."""
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def check(server: Running, seconds: float, allowed: int) -> None:
    """Load after a warm-up, by wrk where it is installed; figures are printed."""
    url = f"{server.url}/v1/stores/store"
    assert load(url, max(1.0, seconds / 6)).n_errors == 0
    before = rss(server)
    found = load(url, seconds)
    after = rss(server)
    print(  # noqa: T201 - these figures are wanted
        f"{found.n:,} requests, {found.per_second:,.0f} a second, p50 {found.p50_ms:.1f} ms, "
        f"p99 {found.p99_ms:.1f} ms, {found.n_errors} errors, "
        f"{before / 1e6:,.0f} MB before, {after / 1e6:,.0f} MB after"
    )
    assert found.n_errors == 0
    assert found.n > 10 * N_CONNECTIONS
    assert after - before <= allowed


def test_for_a_moment(server: Running) -> None:
    check(server, 3, MAX_GROWTH_WARMING)


@pytest.mark.soak
def test_for_half_a_minute(server: Running) -> None:
    check(server, 30, MAX_GROWTH)

"""Ray workers that are stopped and never fail a call: a timeout notices them, and the run ends without them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import actstore
from actstore.extraction.events import Event, SegmentDone
from actstore.extraction.pool import pace
from actstore.extraction.pool.pool import Pool
from tests.faults.conftest import MakeFields, Undisturbed
from tests.faults.finished import check_finished
from tests.workers.processes import worker_pids

pytestmark = [pytest.mark.faults, pytest.mark.ray]


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """A Ray cluster for this file only."""
    from actstore_workers.cluster import cluster

    with cluster(None, num_cpus=2) as connected:
        yield connected


@pytest.mark.parametrize(
    ("num_workers", "when"),
    [(2, (3, 20)), (1, (2,))],
    ids=["two of two, one after the other", "the only one"],
)
def test_stopped_workers_are_replaced(
    ray: ModuleType,
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    when: tuple[int, ...],
) -> None:
    del ray
    monkeypatch.setattr(pace, "FLOOR_S", 2.0)
    monkeypatch.setattr(pace, "START_FLOOR_S", 2.0)  # the stopped worker may have segment 0
    if num_workers == 1:
        monkeypatch.setattr(pace, "ALONE_S", 2.0)
    fields = make_fields(tmp_path / "store", 40)
    done: list[int] = []
    stopped: list[int] = []

    def stop(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        done.append(event.segment)
        pids = [pid for pid in worker_pids() if pid not in stopped]
        if len(done) in when:
            stopped.append(pids[0])
            os.kill(pids[0], signal.SIGSTOP)

    actstore.extract(actstore.plan(**fields), executor="ray", num_workers=num_workers, on_event=stop)
    assert len(stopped) == len(when)
    assert sorted(done) == list(range(40))
    check_finished(fields["out"], undisturbed(fields))


def test_a_worker_that_is_stopped_while_it_starts_is_replaced(
    ray: ModuleType,
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del ray
    monkeypatch.setattr(pace, "START_ALONE_S", 2.0)
    stopped: list[int] = []
    placed = Pool._placed

    def stop_first(pool: Pool, slot: Any, host: str, pid: int) -> None:
        if not stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        else:
            monkeypatch.setattr(pace, "START_ALONE_S", 600.0)
        placed(pool, slot, host, pid)

    monkeypatch.setattr(Pool, "_placed", stop_first)
    fields = make_fields(tmp_path / "store", 6)
    actstore.extract(actstore.plan(**fields), executor="ray", num_workers=1)
    check_finished(fields["out"], undisturbed(fields))
    assert f"the worker in process {stopped[0]} on " in caplog.text
    assert "another one is started" in caplog.text

"""Workers that share a store, killed with SIGKILL at random times, again and again."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import actstore
from actstore.extraction.events import Event, SegmentDone
from tests.faults.child import Child, run
from tests.faults.conftest import Fields, MakeFields, Undisturbed
from tests.faults.finished import check_finished
from tests.workers.processes import worker_pids

N_SEGMENTS = 40
N_KILLS = 11
"""Kills in each of the tests."""
KILLS_A_STORE = 4
N_RAY_KILLS = 4


def kill_some(fields: Fields, rng: random.Random, seconds: float) -> int:
    """Start two workers on a store, kill one or both, and return how many were killed before they had ended."""
    workers = [Child(fields), Child(fields)]
    times = sorted((rng.uniform(0, seconds), i) for i in range(rng.choice([1, 2])))
    killed = []
    for after, i in times:
        if not workers[i].ends_within(workers[i].started + after - time.monotonic()):
            workers[i].kill()
            killed.append(i)
    outcomes = [worker.outcome() for worker in workers]
    for i, outcome in enumerate(outcomes):
        assert not outcome.error, outcome.error
        assert outcome.exitcode in ((-signal.SIGKILL, 0) if i in killed else (0,))
    return sum(outcome.exitcode == -signal.SIGKILL for outcome in outcomes)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_two_workers_killed_at_random_times(
    make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    expected = undisturbed(make_fields(tmp_path, N_SEGMENTS))
    started = time.monotonic()
    run(make_fields(tmp_path / "timed", N_SEGMENTS))
    seconds = time.monotonic() - started
    n_kills, n_stores = 0, 0
    while n_kills < N_KILLS:
        fields = make_fields(tmp_path / str(n_stores), N_SEGMENTS)
        n_stores += 1
        here = 0
        while here < KILLS_A_STORE:
            n = kill_some(fields, rng, seconds)
            here += n
            if n == 0:
                break  # all was done before the time came
        n_kills += here
        run(fields)
        check_finished(fields["out"], expected)
        assert n_stores < 10 * N_KILLS


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """A Ray cluster for this file only."""
    from actstore_workers.cluster import cluster

    with cluster(None, num_cpus=2) as connected:
        yield connected


@pytest.mark.faults
@pytest.mark.ray
def test_ray_workers_killed_at_random_times(
    ray: ModuleType, make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    del ray
    n_segments = 80
    fields = make_fields(tmp_path / "store", n_segments)
    rng = random.Random(0)
    # Kill only after some segments are committed: a cluster whose workers all fail to start gives up, as it should.
    when = rng.sample(range(2, n_segments - 2), N_RAY_KILLS)
    done: list[int] = []
    killed: list[int] = []

    def kill(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        done.append(event.segment)
        pids = [pid for pid in worker_pids() if pid not in killed]
        if len(done) in when and pids:
            killed.append(rng.choice(pids))
            os.kill(killed[-1], signal.SIGKILL)

    actstore.extract(actstore.plan(**fields), executor="ray", num_workers=2, on_event=kill)
    assert len(killed) == N_RAY_KILLS
    assert sorted(done) == list(range(n_segments))
    check_finished(fields["out"], undisturbed(fields))

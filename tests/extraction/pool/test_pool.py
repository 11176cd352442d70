"""Which failures of workers count, and what happens to their units, with a fleet that follows a script."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from actstore.errors import ExtractError, ModelError, SetAsideError
from actstore.extraction.pool import pool
from actstore.extraction.pool.pool import MAX_ATTEMPTS, MAX_FAILURES, Pool
from tests.extraction.pool.scripted_fleet import HANGS, Script, ScriptedFleet, died, raised

N = 30


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run all units by a script; returns those that were done, in order, and the fleet."""

    def run(script: Script, *, size: int = 1) -> tuple[list[int], ScriptedFleet]:
        fleet, done = ScriptedFleet(script, size), list[int]()
        monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: fleet.now))
        try:
            Pool(fleet, "segment", range(N), lambda segment: done.append(segment.segment)).run()
        finally:
            run.done = done  # type: ignore[attr-defined]
        return done, fleet

    return run


@pytest.mark.parametrize("what", ["start", 4])
def test_preempted_workers_are_no_failure(run: Any, what: Any) -> None:
    """Preemptions never count: machines that can be preempted are what makes a run cheap."""
    n = 3 * MAX_ATTEMPTS
    done, fleet = run(lambda worker, call: died(preempted=True) if call == what and worker < n else None)
    assert sorted(done) == list(range(N))
    assert len(fleet.workers) == n + 1


def test_workers_that_never_start_end_the_run(run: Any) -> None:
    message = "workers failed to start 3 times in a row; the last time: OSError: the node is gone"
    with pytest.raises(ExtractError, match=re.escape(message)):
        run(lambda _worker, call: died(preempted=False) if call == "start" else None)


@pytest.mark.parametrize("outcome", [died(preempted=False), raised(OSError("the disk is full"))])
@pytest.mark.parametrize("size", [1, 3])
def test_a_unit_that_always_fails_is_set_aside(run: Any, outcome: Exception, size: int) -> None:
    """The others are done first."""
    with pytest.raises(
        SetAsideError, match="^1 segment failed 3 times and is missing, all others are done"
    ) as e:
        run(lambda _worker, call: outcome if call == 4 else None, size=size)
    assert str(outcome) in str(e.value)
    assert sorted(run.done) == [unit for unit in range(N) if unit != 4]


def test_units_that_all_fail_end_the_run(run: Any) -> None:
    """Not after three attempts at each: storage may be gone."""
    made: list[int] = []

    def script(_worker: int, call: Any) -> Any:
        if isinstance(call, int):
            made.append(call)
            return raised(OSError("no route to the storage"))
        return None

    with pytest.raises(
        ExtractError, match="segments failed one after the other, so the run is given up; the last"
    ):
        run(script)
    assert len(made) == MAX_FAILURES


def test_an_idle_worker_takes_what_waits_behind_others(run: Any) -> None:
    """Of two workers one is stuck with its first unit, without being late enough to be given up."""
    begun: list[tuple[int, Any]] = []

    def script(worker: int, call: Any) -> Any:
        begun.append((worker, call))
        return HANGS if worker == 0 and call == 0 else None

    done, fleet = run(script, size=2)
    assert sorted(done) == list(range(N))
    assert len(fleet.workers) == 2
    assert (1, 0) in begun


def test_a_unit_that_two_workers_have_done_counts_once(run: Any) -> None:
    """A worker that was late with two units ends the first one just before an idle worker does."""
    n_calls = {"late": 0, "again": 0}

    def script(worker: int, call: Any) -> Any:
        if worker == 1 and call in (0, 2):
            n_calls["again"] += 1
            return None if call == 2 else HANGS
        if worker == 0 and call in (0, 2):
            n_calls["late"] += 1
            return None if n_calls["again"] and (call == 2 or n_calls["late"] > 20 * N) else HANGS
        return None

    done, _ = run(script, size=2)
    assert sorted(done) == list(range(N))


def test_a_unit_that_fails_while_another_worker_has_it_is_not_set_aside(run: Any) -> None:
    """It fails for the third time where it was late, and the worker that took it again ends it."""
    begun: list[int] = []
    polls: list[int] = []

    def script(worker: int, call: Any) -> Any:
        if call != 4:
            return None
        if worker not in begun:
            begun.append(worker)
        if len(begun) < MAX_ATTEMPTS:
            return raised(OSError("the disk is full"))
        if worker == begun[MAX_ATTEMPTS - 1]:
            return raised(OSError("late")) if len(begun) > MAX_ATTEMPTS else HANGS
        polls.append(worker)
        return None if len(polls) > 3 else HANGS

    done, _ = run(script, size=2)
    assert len(begun) == MAX_ATTEMPTS + 1
    assert sorted(done) == list(range(N))


def test_the_pool_grows_with_its_fleet(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines may join at any time; no more workers are started than there are units for."""
    monkeypatch.setattr(pool, "_GROWTH_S", 0.0)
    monkeypatch.setattr(ScriptedFleet, "size", lambda fleet: 1 if len(fleet.calls) < 10 else 4)
    done, fleet = run(lambda _worker, _call: None)
    assert sorted(done) == list(range(N))
    assert {worker.number for worker in fleet.workers} == {0, 1, 2, 3}
    monkeypatch.setattr(ScriptedFleet, "size", lambda _fleet: 4 * N)
    _, fleet = run(lambda _worker, _call: None)
    assert len(fleet.workers) == N


def test_failed_starts_beside_a_worker_that_is_ready_end_nothing(run: Any) -> None:
    """One machine is bad: the run is slower without it, and completes."""
    done, fleet = run(
        lambda worker, call: died(preempted=False) if call == "start" and worker else None, size=2
    )
    assert sorted(done) == list(range(N))
    assert len(fleet.workers) > MAX_ATTEMPTS


def test_failed_starts_count_in_a_row(run: Any) -> None:
    """Over a long run there may be any number of failed starts."""

    def script(worker: int, call: Any) -> Any:
        fails = (call == "start" and worker % 3 < 2) or (call == worker and worker % 3 == 2)
        return died(preempted=False) if fails else None

    done, fleet = run(script)
    assert sorted(done) == list(range(N))
    assert len(fleet.workers) > 2 * MAX_ATTEMPTS


@pytest.mark.parametrize("what", ["start", 0])
def test_what_no_further_attempt_could_mend_is_told_at_once(run: Any, what: Any) -> None:
    made: set[int] = set()

    def script(worker: int, call: Any) -> Any:
        made.add(worker)
        return raised(ModelError("the weights are others")) if call == what else None

    with pytest.raises(ModelError, match="^the weights are others$"):
        run(script)
    assert made == {0}


def test_only_the_first_segment_of_a_dead_worker_is_to_blame(run: Any) -> None:
    """The other segments that the worker had been given failed with it."""
    fatal = {0: 0, 1: 0, 2: 1}
    done, fleet = run(lambda worker, call: died(preempted=False) if call == fatal.get(worker) else None)
    assert sorted(done) == list(range(N))
    assert len(fleet.workers) == 4


def test_all_segments_of_a_worker_that_hangs_are_given_to_others(run: Any) -> None:
    """This includes the segments that it had been given in advance."""

    def script(worker: int, call: Any) -> Any:
        return HANGS if worker == 0 and isinstance(call, int) and call >= 3 else None

    done, fleet = run(script)
    assert sorted(done) == list(range(N))
    assert len(fleet.workers) == 2
    assert fleet.now > 60

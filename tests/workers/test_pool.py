"""Which failures of workers count, and what happens to their segments, with a scripted Ray."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from actstore.errors import ExtractError, ModelError
from actstore.extraction.computing.worker import WorkerSpec
from actstore_workers import driver
from actstore_workers.driver import MAX_ATTEMPTS
from tests.workers.scripted_ray import HANGS, Script, ScriptedRay, died, raised

N = 30


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run all segments by a script; returns those that were done, in order, and the scripted Ray."""

    def run(script: Script, *, size: int = 1) -> tuple[list[int], ScriptedRay]:
        ray, done = ScriptedRay(script), list[int]()
        monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: ray.now))
        spec = WorkerSpec("a store", "a model", n_threads=1)
        driver._Pool(ray, spec, size, range(N), lambda segment: done.append(segment.segment)).run()  # type: ignore[arg-type]
        return done, ray

    return run


@pytest.mark.parametrize("what", ["start", 4])
def test_preempted_workers_are_no_failure(run: Any, what: Any) -> None:
    """Preemptions never count: machines that can be preempted are what makes a run cheap."""
    n = 3 * MAX_ATTEMPTS
    done, ray = run(lambda worker, call: died(preempted=True) if call == what and worker < n else None)
    assert sorted(done) == list(range(N))
    assert len(ray.actors) == n + 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("start", "workers failed to start 3 times in a row; the last time: RayActorError: the node is gone"),
        (
            4,
            "segment 4 failed 3 times, so the run is given up; the last time: RayActorError: the node is gone",
        ),
    ],
)
def test_others_are(run: Any, what: Any, message: str) -> None:
    with pytest.raises(ExtractError, match=re.escape(message)):
        run(lambda _worker, call: died(preempted=False) if call == what else None)


def test_failed_starts_beside_a_worker_that_is_ready_end_nothing(run: Any) -> None:
    """One machine is bad: the run is slower without it, and completes."""
    done, ray = run(
        lambda worker, call: died(preempted=False) if call == "start" and worker else None, size=2
    )
    assert sorted(done) == list(range(N))
    assert len(ray.actors) > MAX_ATTEMPTS


def test_failed_starts_count_in_a_row(run: Any) -> None:
    """Over a long run there may be any number of failed starts."""

    def script(worker: int, call: Any) -> Any:
        fails = (call == "start" and worker % 3 < 2) or (call == worker and worker % 3 == 2)
        return died(preempted=False) if fails else None

    done, ray = run(script)
    assert sorted(done) == list(range(N))
    assert len(ray.actors) > 2 * MAX_ATTEMPTS


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
    done, ray = run(lambda worker, call: died(preempted=False) if call == fatal.get(worker) else None)
    assert sorted(done) == list(range(N))
    assert len(ray.actors) == 4


def test_all_segments_of_a_worker_that_hangs_are_given_to_others(run: Any) -> None:
    """This includes the segments that it had been given in advance."""

    def script(worker: int, call: Any) -> Any:
        return HANGS if worker == 0 and isinstance(call, int) and call >= 3 else None

    done, ray = run(script)
    assert sorted(done) == list(range(N))
    assert len(ray.actors) == 2
    assert ray.now > 60

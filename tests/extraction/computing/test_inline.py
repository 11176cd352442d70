"""The inline executor: what it holds at once."""

import gc
import threading
import weakref
from dataclasses import dataclass
from typing import ClassVar

from actstore.extraction.computing import inline
from actstore.extraction.computing.executor import Resources
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT

N = 60
AHEAD = 2 * SEGMENTS_IN_FLIGHT


class Sums:
    """A result that is seen to be alive."""

    def __init__(self, index: int) -> None:
        self.index = index


class Summing:
    """Results that come at once, and are counted for as long as anything holds them."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Sums] = weakref.WeakSet()
        self.n_made = 0
        self.made = threading.Condition()

    def run(self, index: int) -> Sums:
        sums = Sums(index)
        with self.made:
            self.alive.add(sums)
            self.n_made += 1
            self.made.notify_all()
        return sums

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Spec:
    unit: ClassVar[str] = "unit"
    worker: Summing
    device: str | None = None
    n_threads: int | None = None

    def start(self) -> Summing:
        return self.worker


def test_results_end_when_they_were_taken_and_are_not_made_far_ahead() -> None:
    """Sums of a unit of a scan can take gigabytes."""
    worker = Summing()
    taken: list[int] = []
    most = 0

    def on_done(sums: Sums) -> None:
        nonlocal most
        taken.append(sums.index)
        with worker.made:  # whoever is ahead has made all that it may
            worker.made.wait_for(lambda: worker.n_made >= min(N, len(taken) + AHEAD - 1), timeout=30)
            gc.collect()
            most = max(most, len(worker.alive))

    inline.run(Spec(worker), range(N), Resources(), on_done)
    assert sorted(taken) == list(range(N))
    assert most <= AHEAD

"""A fleet that follows a script: tests can neither preempt machines nor wait half an hour.

Calls end in the order in which they were made, except those that hang. All calls of a worker that dies fail.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

from actstore.extraction.events import SegmentDone
from actstore.extraction.pool.fleet import Call, WorkerLostError, WorkerRaisedError

HANGS: Final = object()
"""The outcome of a call that does not return yet; the script is asked again later."""
Script = Callable[[int, Any], Any]
"""A function of the number of a worker, from 0, and its call (``place``, ``start`` or a unit). It returns the outcome:
None for the usual one, an exception, or `HANGS`.
"""


def died(*, preempted: bool) -> WorkerLostError:
    """The error of all calls of a dead worker."""
    return WorkerLostError(OSError("the node is gone"), was_preempted=preempted)


def raised(cause: Exception) -> WorkerRaisedError:
    """The error of one call in which a living worker raised an error."""
    return WorkerRaisedError(cause)


@dataclass(eq=False)
class _Worker:
    number: int
    death: Exception | None = None


@dataclass(eq=False)
class MadeCall:
    worker: _Worker
    what: Call
    outcome: Any = None


@dataclass
class ScriptedFleet:
    """See `actstore.extraction.pool.fleet.Fleet`. Its clock advances when a wait times out."""

    script: Script
    room: int = 1
    calls: list[MadeCall] = field(default_factory=list)
    workers: list[_Worker] = field(default_factory=list)
    now: float = 0.0

    def size(self) -> int:
        return self.room

    def add(self) -> _Worker:
        self.workers.append(_Worker(len(self.workers)))
        return self.workers[-1]

    def call(self, worker: _Worker, call: Call) -> MadeCall:
        self.calls.append(MadeCall(worker, call))
        return self.calls[-1]

    def ended(self, calls: Collection[MadeCall], timeout: float) -> list[MadeCall]:
        for call in self.calls:
            if call in calls and self._has_ended(call):
                return [call]
        self.now += timeout
        return []

    def _has_ended(self, call: MadeCall) -> bool:
        if call.worker.death is None and (call.outcome is None or call.outcome is HANGS):
            call.outcome = self.script(call.worker.number, call.what)
            if isinstance(call.outcome, WorkerLostError):
                call.worker.death = call.outcome
        return call.worker.death is not None or call.outcome is not HANGS

    def result(self, call: MadeCall) -> Any:
        outcome = call.outcome if call.worker.death is None else call.worker.death
        if isinstance(outcome, Exception):
            raise outcome
        usual: dict[Any, Any] = {"place": ("a host", 100 + call.worker.number), "start": None}
        return usual[call.what] if call.what in usual else SegmentDone(int(call.what), 1, 0, 0.0, 0.0, 0.0)

    def remove(self, worker: _Worker) -> None:
        worker.death = worker.death or died(preempted=False)

    def wanting(self) -> str:
        return "a machine"

"""The ray executor: a pool of workers that compute unit by unit, with a limited number of retries.

A unit is a segment of an extraction, or a part of a patching job; both are called segments here.
"""

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from actstore.errors import (
    ActstoreError,
    BusyError,
    ExtractError,
    HookError,
    JobError,
    ModelError,
    PatchError,
    PlanMismatchError,
    TokensError,
)
from actstore.extraction.computing.executor import Done, Resources, Spec
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT
from actstore.reason import reason
from actstore_workers.actor import ActorOptions, make_actor
from actstore_workers.cluster import cluster, import_ray
from actstore_workers.pace import Pace

import_ray()  # fails at import, before any work, if Ray is not installed

_log = logging.getLogger("actstore")

MAX_ATTEMPTS = 3
"""The most attempts at one segment, and at starting workers in a row. Preempted workers do not count."""
_PERMANENT = (BusyError, JobError, ModelError, HookError, PatchError, PlanMismatchError, TokensError)
"""Errors that every further attempt would raise again."""
_WAIT_S = 1.0
_STALL_WARNING_S = 60.0


def workers_here(resources: Resources) -> int | None:
    """See `actstore.extraction.computing.executor.workers_here`. A cluster that is joined has its own machines."""
    if resources.ray_address is not None or import_ray().is_initialized():
        return None
    return resources.num_workers or 1


def run(
    spec: Spec[Done],
    pending: Sequence[int],
    resources: Resources,
    on_done: Callable[[Done], None],
) -> None:
    """Compute all pending segments on Ray; see `actstore.extraction.computing.executor.Executor`.

    Workers write their shards to the store themselves and return figures. A worker that dies, or is silent for much
    longer than segments have taken so far, is replaced, and its segments are given to others. It is the store, not Ray,
    that guarantees that each segment is committed exactly once.
    """
    num_workers = resources.num_workers
    # Ray counts the CPUs that this container may use; a number is needed only for more workers than CPUs.
    cpus = num_workers if num_workers is not None and num_workers > len(os.sched_getaffinity(0)) else None
    with cluster(resources.ray_address, num_cpus=cpus) as ray:
        size = num_workers or max(1, int(ray.cluster_resources().get("GPU", 0)))
        _Pool(ray, spec, min(size, len(pending)), pending, on_done).run()


@dataclass(eq=False)
class _Slot:
    """A place in the pool, with the actor that fills it."""

    actor: Any
    is_ready: bool = False
    n_running: int = 0
    where: str = "a worker that is not placed yet"
    silent_since: float = math.inf
    """Time of the last sign of life, or of the first call after a time without any; infinite before the actor is
    placed.
    """
    last_done: float = -math.inf
    """Time at which it last finished a segment."""


_Call = int | Literal["place", "start"]
"""The number of a segment, or a step before the first segment."""


class _Pool:
    def __init__(
        self,
        ray: ModuleType,
        spec: Spec[Any],
        size: int,
        pending: Sequence[int],
        on_done: Callable[[Any], None],
    ) -> None:
        self._ray = ray
        self._spec = spec
        self._options = ActorOptions.choose(ray, spec, size)
        self._pending = deque(pending)
        self._on_done = on_done
        self._attempts: Counter[int] = Counter()
        self._hangs: Counter[int] = Counter()
        """Number of workers that were given up over each segment."""
        self._failed_starts = 0
        self._pace = Pace()
        self._calls: dict[Any, tuple[_Slot, _Call]] = {}
        """The calls that are under way, with the slot and the kind of each."""
        self._slots = [self._fill() for _ in range(size)]

    def run(self) -> None:
        """Run until no segment is left."""
        stalled_since = time.monotonic()
        try:
            while self._pending or any(isinstance(what, int) for _, what in self._calls.values()):
                self._feed()
                done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_WAIT_S)
                for call in done:
                    self._finish(call)
                    stalled_since = time.monotonic()
                for slot in list(self._slots):
                    self._give_up_if_hung(slot)
                if time.monotonic() - stalled_since > _STALL_WARNING_S and not all(
                    s.is_ready for s in self._slots
                ):
                    self._warn_of_stall()
                    stalled_since = time.monotonic()
        finally:
            for slot in self._slots:
                self._ray.kill(slot.actor)

    def _warn_of_stall(self) -> None:
        resources = self._ray.cluster_resources().items()
        _log.warning(
            "%d workers have not started yet, waiting for %g CPUs and %g GPUs each; the cluster has %s",
            sum(not slot.is_ready for slot in self._slots),
            self._options.num_cpus,
            self._options.num_gpus,
            {name: n for name, n in resources if name in ("CPU", "GPU")},
        )

    def _any_ready(self) -> bool:
        return any(slot.is_ready for slot in self._slots)

    def _fill(self) -> _Slot:
        slot = _Slot(make_actor(self._ray, self._spec, self._options))
        self._calls[slot.actor.place.remote()] = (slot, "place")
        return slot

    def _feed(self) -> None:
        """Give every worker one segment to compute and the next ones in advance, one round at a time."""
        for depth in range(1, SEGMENTS_IN_FLIGHT + 1):
            for slot in self._slots:
                if self._pending and slot.is_ready and slot.n_running < depth:
                    index = self._pending.popleft()
                    if not slot.n_running:
                        slot.silent_since = time.monotonic()
                    slot.n_running += 1
                    self._calls[slot.actor.run.remote(index)] = (slot, index)

    def _finish(self, call: Any) -> None:
        slot, what = self._calls.pop(call)
        errors = self._ray.exceptions
        try:
            result = self._ray.get(call)
        except errors.RayTaskError as error:
            self._retry(slot, what, error.cause)
        except errors.RayError as error:
            # Whether it died, was killed for memory, lost its node or was never placed, the remedy is the same.
            self._replace(slot, what, error)
        else:
            self._succeed(slot, what, result)

    def _succeed(self, slot: _Slot, what: _Call, result: Any) -> None:
        now = time.monotonic()
        if what == "place":
            host, pid = result
            self._placed(slot, host, pid)
        elif what == "start":
            self._pace.started(now - slot.silent_since)
            slot.is_ready = True
            self._failed_starts = 0
        else:
            self._pace.finished(now - slot.silent_since)
            slot.n_running -= 1
            slot.silent_since = slot.last_done = now
            self._on_done(result)

    def _placed(self, slot: _Slot, host: str, pid: int) -> None:
        """Start a worker that the cluster has placed; its time counts from here on."""
        slot.where = f"the worker in process {pid} on {host}"
        slot.silent_since = time.monotonic()
        self._calls[slot.actor.start.remote()] = (slot, "start")

    def _give_up_if_hung(self, slot: _Slot) -> None:
        """Replace a worker that is silent for too long: a stopped or hanging process fails no call."""
        silent = time.monotonic() - slot.silent_since
        calls = {call: what for call, (owner, what) in self._calls.items() if owner is slot}
        deadline = self._deadline(slot, calls.values())
        # A finished call that was not fetched yet is a sign of life, too, since callers can be slow.
        if not calls or silent <= deadline or self._ray.wait(list(calls), timeout=0)[0]:
            return
        segments = [what for what in calls.values() if isinstance(what, int)]
        for call in calls:
            del self._calls[call]
        self._hangs.update(segments)
        to_do = f"{self._spec.unit}s {segments} are given to others" if segments else "another one is started"
        known = self._pace.segment if segments else self._pace.start
        _log.warning(
            "%s was silent for %.0f s%s; %s",
            *(
                slot.where,
                silent,
                "" if known is None else f", where {known:.1f} s were the most before",
                to_do,
            ),
        )
        error = ExtractError(f"{slot.where} was silent for {silent:.0f} s")
        self._pending.extend(segments[1:])
        self._replace(slot, segments[0] if segments else "start", error)

    def _deadline(self, slot: _Slot, calls: Collection[_Call]) -> float:
        """Seconds that a worker may be silent over these calls."""
        segments = [what for what in calls if isinstance(what, int)]
        if not segments:
            return self._pace.start_deadline(self._failed_starts)
        loads_again = 0 in segments
        n_attempts = max(self._hangs[index] for index in segments)
        deadline = self._pace.deadline(n_attempts, is_alone=False, loads_again=loads_again)
        others = [other for other in self._slots if other is not slot and other.is_ready]
        late = slot.silent_since + deadline / 2
        if any(not other.n_running or other.last_done > late for other in others):
            return deadline
        return self._pace.deadline(n_attempts, is_alone=True, loads_again=loads_again)

    def _retry(self, slot: _Slot, what: _Call, cause: Exception) -> None:
        """Replace a worker that has reported an error. It is replaced although it lives: a GPU in a bad state would
        fail every segment at once, and ask for the next one first.
        """
        if isinstance(cause, _PERMANENT):
            raise cause
        self._replace(slot, what, cause)

    def _replace(self, slot: _Slot, what: _Call, error: Exception) -> None:
        """Give up a worker, whose calls all come here; the first of them refills its slot."""
        preempted = bool(getattr(error, "preempted", False))
        if isinstance(what, int):
            self._pending.append(what)
        if slot in self._slots:
            # Only the first failed call is to blame; the others failed with their worker.
            if isinstance(what, int) and not preempted:
                self._count_attempt(what, error)
            if not slot.is_ready and not preempted:
                self._count_start(error)
            _log.warning("a worker failed and is replaced: %s", _described(error))
            # The worker may still live and hold its GPU. Its other calls come back as those of a dead actor.
            self._ray.kill(slot.actor)
            self._slots[self._slots.index(slot)] = self._fill()

    def _count_attempt(self, index: int, cause: Exception) -> None:
        self._attempts[index] += 1
        if self._attempts[index] >= MAX_ATTEMPTS:
            raise ExtractError(
                f"{self._spec.unit} {index} failed {MAX_ATTEMPTS} times, so the run is given up; the last time: "
                f"{_described(cause)}"
            ) from cause

    def _count_start(self, cause: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_ATTEMPTS and not self._any_ready():
            raise ExtractError(
                f"workers failed to start {MAX_ATTEMPTS} times in a row; the last time: {_described(cause)}"
            ) from cause


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, ActstoreError) else f"{type(error).__name__}: {reason(error)}"

"""The ray executor: a pool of workers, fed segment by segment, with retries that are counted."""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from actstore.errors import (
    ActstoreError,
    ExtractError,
    HookError,
    JobError,
    ModelError,
    PlanMismatchError,
    TokensError,
)
from actstore.extraction.events import SegmentDone
from actstore.extraction.executor import Resources
from actstore.extraction.worker import SEGMENTS_IN_FLIGHT, WorkerSpec
from actstore_workers.actor import ActorOptions, make_actor
from actstore_workers.cluster import cluster, import_ray

import_ray()  # fails here, when the executor is looked up and before any work, if Ray is not installed

_log = logging.getLogger("actstore")

MAX_ATTEMPTS = 3
"""Of one segment, and of starting one worker. Preempted workers do not count."""
_HOPELESS = (JobError, ModelError, HookError, PlanMismatchError, TokensError)
"""Errors that every further attempt would meet again."""
_WAIT_S = 1.0
_STALL_WARNING_S = 60.0


def run(
    spec: WorkerSpec,
    pending: Sequence[int],
    resources: Resources,
    on_segment: Callable[[SegmentDone], None],
) -> None:
    """Compute all pending segments on Ray; see `actstore.extraction.executor.Executor`.

    Workers write their own shards to the store and return figures. A worker that dies is replaced, and its
    segments are given out again; exactly once is the store's promise, not Ray's.
    """
    asked = resources.num_workers
    # Ray counts the CPUs that this container may use; only more workers than CPUs need to be asked for.
    cpus = asked if asked is not None and asked > len(os.sched_getaffinity(0)) else None
    with cluster(resources.ray_address, num_cpus=cpus) as ray:
        size = asked or max(1, int(ray.cluster_resources().get("GPU", 0)))
        _Pool(ray, spec, min(size, len(pending)), pending, on_segment).run()


@dataclass(eq=False)
class _Slot:
    """A place in the pool, with the actor that fills it."""

    actor: Any
    is_ready: bool = False
    n_running: int = 0


class _Pool:
    def __init__(
        self,
        ray: ModuleType,
        spec: WorkerSpec,
        size: int,
        pending: Sequence[int],
        on_segment: Callable[[SegmentDone], None],
    ) -> None:
        self._ray = ray
        self._spec = spec
        self._options = ActorOptions.choose(ray, spec, size)
        self._pending = deque(pending)
        self._on_segment = on_segment
        self._attempts: Counter[int] = Counter()
        self._failed_starts = 0
        self._calls: dict[Any, tuple[_Slot, int | None]] = {}
        """What is under way: the slot, and the segment, or None for a start."""
        self._slots = [self._fill() for _ in range(size)]

    def run(self) -> None:
        """Until nothing is left."""
        stalled_since = time.monotonic()
        try:
            while self._pending or any(index is not None for _, index in self._calls.values()):
                self._feed()
                done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_WAIT_S)
                for call in done:
                    self._finish(call)
                    stalled_since = time.monotonic()
                if time.monotonic() - stalled_since > _STALL_WARNING_S and not all(
                    s.is_ready for s in self._slots
                ):
                    _log.warning(
                        "%d workers have not started yet, waiting for %g CPUs and %g GPUs each; the cluster has %s",
                        sum(not slot.is_ready for slot in self._slots),
                        self._options.num_cpus,
                        self._options.num_gpus,
                        {
                            name: n
                            for name, n in self._ray.cluster_resources().items()
                            if name in ("CPU", "GPU")
                        },
                    )
                    stalled_since = time.monotonic()
        finally:
            for slot in self._slots:
                self._ray.kill(slot.actor)

    def _any_ready(self) -> bool:
        return any(slot.is_ready for slot in self._slots)

    def _fill(self) -> _Slot:
        slot = _Slot(make_actor(self._ray, self._spec, self._options))
        self._calls[slot.actor.start.remote()] = (slot, None)
        return slot

    def _feed(self) -> None:
        """Give every worker one segment to compute and the next ones to have at hand, one round at a time."""
        for depth in range(1, SEGMENTS_IN_FLIGHT + 1):
            for slot in self._slots:
                if self._pending and slot.is_ready and slot.n_running < depth:
                    index = self._pending.popleft()
                    slot.n_running += 1
                    self._calls[slot.actor.run.remote(index)] = (slot, index)

    def _finish(self, call: Any) -> None:
        slot, index = self._calls.pop(call)
        errors = self._ray.exceptions
        try:
            result = self._ray.get(call)
        except errors.RayTaskError as error:
            self._retry(slot, index, error.cause)
        except errors.RayError as error:
            # Died, killed for memory, node lost, never placed: Ray has a class for each, the cure is the same.
            self._replace(slot, index, error)
        else:
            if index is None:
                slot.is_ready = True
                self._failed_starts = 0
            else:
                slot.n_running -= 1
                self._on_segment(result)

    def _retry(self, slot: _Slot, index: int | None, cause: Exception) -> None:
        """The worker lives and has told what went wrong. It is replaced all the same: a GPU in a bad state would
        fail every segment at once, and be the first to ask for the next.
        """
        if isinstance(cause, _HOPELESS):
            raise cause
        self._replace(slot, index, cause)

    def _replace(self, slot: _Slot, index: int | None, error: Exception) -> None:
        """The worker is given up; each of its calls comes here, the first one fills its place."""
        preempted = bool(getattr(error, "preempted", False))
        if index is not None:
            self._pending.append(index)
        if slot in self._slots:
            # Only the first call that fails is to blame; the others fell with their worker.
            if index is not None and not preempted:
                self._count_attempt(index, error)
            if not slot.is_ready and not preempted:
                self._count_start(error)
            _log.warning("a worker failed and is replaced: %s", _first_line(error))
            # It may still live and hold its GPU. What else it had in hand comes back as a dead actor's calls.
            self._ray.kill(slot.actor)
            self._slots[self._slots.index(slot)] = self._fill()

    def _count_attempt(self, index: int, cause: Exception) -> None:
        self._attempts[index] += 1
        if self._attempts[index] >= MAX_ATTEMPTS:
            raise ExtractError(
                f"segment {index} failed {MAX_ATTEMPTS} times, so the run is given up; the last time: "
                f"{_first_line(cause)}"
            ) from cause

    def _count_start(self, cause: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_ATTEMPTS and not self._any_ready():
            raise ExtractError(
                f"workers failed to start {MAX_ATTEMPTS} times in a row; the last time: {_first_line(cause)}"
            ) from cause


def _first_line(error: Exception) -> str:
    if isinstance(error, ActstoreError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

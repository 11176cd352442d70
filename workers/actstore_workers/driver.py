"""The ray executor: a pool of workers that are Ray actors.

A unit is a segment of an extraction, a part of a patching job, or a part of a scan.
"""

import os
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

from actstore.extraction.computing.executor import Done, Resources, Spec
from actstore.extraction.pool.fleet import Call, WorkerLostError, WorkerRaisedError
from actstore.extraction.pool.pool import Pool
from actstore_workers.actor import ActorOptions, make_actor
from actstore_workers.cluster import cluster, import_ray

import_ray()  # fails at import, before any work, if Ray is not installed


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
    """Compute all pending units on Ray; see `actstore.extraction.computing.executor.Executor`.

    Workers write their shards to the store themselves and return figures. Without a number of workers there is one for
    each GPU of the cluster, also for those that join it later.
    """
    num_workers = resources.num_workers
    # Ray counts the CPUs that this container may use; a number is needed only for more workers than CPUs.
    cpus = num_workers if num_workers is not None and num_workers > len(os.sched_getaffinity(0)) else None
    with cluster(resources.ray_address, num_cpus=cpus) as ray:
        Pool(RayFleet(ray, spec, num_workers, len(pending)), spec.unit, pending, on_done).run()


class RayFleet:
    """Workers that are Ray actors; see `actstore.extraction.pool.fleet.Fleet`."""

    def __init__(self, ray: ModuleType, spec: Spec[Any], num_workers: int | None, n_units: int) -> None:
        self._ray = ray
        self._spec = spec
        self._num_workers = num_workers
        self._options = ActorOptions.choose(ray, spec, min(self.size(), n_units))

    def size(self) -> int:
        """The number that was asked for, or that of GPUs in the cluster now."""
        return self._num_workers or max(1, int(self._ray.cluster_resources().get("GPU", 0)))

    def add(self) -> Any:
        """An actor, which Ray places when there is room."""
        return make_actor(self._ray, self._spec, self._options)

    def call(self, worker: Any, call: Call) -> Any:
        """A reference to what the call will return."""
        if isinstance(call, int):
            return worker.run.remote(call)
        return worker.place.remote() if call == "place" else worker.start.remote()

    def ended(self, calls: Collection[Any], timeout: float) -> list[Any]:
        """Wait for one, and take all that have ended by then."""
        ended, others = self._ray.wait(list(calls), num_returns=1, timeout=timeout)
        if ended and others:
            ended += self._ray.wait(others, num_returns=len(others), timeout=0)[0]
        return list(ended)

    def result(self, call: Any) -> Any:
        """See `Fleet.result`."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except errors.RayTaskError as error:
            raise WorkerRaisedError(error.cause) from error
        except errors.RayError as error:
            raise WorkerLostError(error, was_preempted=bool(getattr(error, "preempted", False))) from error

    def remove(self, worker: Any) -> None:
        """Kill the actor."""
        self._ray.kill(worker)

    def wanting(self) -> str:
        """See `Fleet.wanting`."""
        resources = self._ray.cluster_resources()
        return (
            f"{self._options.num_cpus:g} CPUs and {self._options.num_gpus:g} GPUs each; the cluster has "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        )

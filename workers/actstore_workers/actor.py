"""The Ray actor that runs a worker."""

import dataclasses
import os
import platform
from types import ModuleType
from typing import Any

from actstore.extraction.computing.executor import Computes, Spec
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT


class WorkerActor:
    """Holds a worker, which loads in `start` rather than on creation, so that its errors arrive unchanged."""

    def __init__(self, spec: Spec[Any]) -> None:
        self._spec = spec
        self._worker: Computes[Any] | None = None

    def place(self) -> tuple[str, int]:
        """Return the host and process of this actor. An answer shows that the cluster had room for it."""
        return platform.node(), os.getpid()

    def start(self) -> None:
        """Load the model."""
        self._worker = self._spec.start()

    def run(self, index: int) -> Any:
        """Compute a unit of work. Figures are sent back, and the results of patching, but never activations."""
        assert self._worker is not None
        return self._worker.run(index)


@dataclasses.dataclass(frozen=True)
class ActorOptions:
    """The resources that one actor reserves."""

    num_cpus: float
    num_gpus: float

    @classmethod
    def choose(cls, ray: ModuleType, spec: Spec[Any], num_workers: int) -> "ActorOptions":
        """Reserve a GPU each if there are any or a GPU is named as device; otherwise an equal share of the CPUs."""
        resources = ray.cluster_resources()
        wants_gpu = (spec.device or "").startswith("cuda")
        if wants_gpu or (spec.device is None and resources.get("GPU", 0) >= 1):
            return cls(num_cpus=1, num_gpus=1)
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        # The largest share with which all workers fit; an actor cannot span nodes.
        shares = range(max(nodes, default=1), 0, -1)
        fits = (share for share in shares if sum(cpus // share for cpus in nodes) >= num_workers)
        return cls(num_cpus=next(fits, 1), num_gpus=0)


def make_actor(ray: ModuleType, spec: Spec[Any], options: ActorOptions) -> Any:
    """Start an actor. Ray neither restarts it nor repeats its calls: the driver does, and counts attempts."""
    if options.num_gpus == 0 and spec.n_threads is None:
        spec = dataclasses.replace(spec, n_threads=int(options.num_cpus))
    remote = ray.remote(
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=SEGMENTS_IN_FLIGHT,
    )(WorkerActor)
    return remote.remote(spec)

"""What a worker reserves fits a machine of the cluster."""

from typing import Any

import pytest

from actstore.extraction.computing.worker import WorkerSpec
from actstore_workers.actor import ActorOptions


class Cluster:
    """A cluster that reports these machines, as Ray does."""

    def __init__(self, *cpus: float, n_gpus: float = 0) -> None:
        self._cpus = cpus
        self._n_gpus = n_gpus

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": sum(self._cpus), "GPU": self._n_gpus}

    def nodes(self) -> list[dict[str, Any]]:
        alive = [{"Alive": True, "Resources": {"CPU": n}} for n in self._cpus]
        return [*alive, {"Alive": False, "Resources": {"CPU": 64.0}}]


@pytest.mark.parametrize(
    ("cluster", "n_workers", "share"),
    [
        (Cluster(8), 1, 8),
        (Cluster(8), 3, 2),
        (Cluster(4, 4), 2, 4),
        (Cluster(4, 4), 3, 2),
        (Cluster(5, 5, 5), 4, 2),
        (Cluster(2), 5, 1),
        (Cluster(), 1, 1),
    ],
)
def test_cpus_are_shared_so_that_every_worker_finds_a_place(cluster: Any, n_workers: int, share: int) -> None:
    chosen = ActorOptions.choose(cluster, WorkerSpec("a store", "a model"), n_workers)
    assert (chosen.num_cpus, chosen.num_gpus) == (share, 0)


@pytest.mark.parametrize(
    ("device", "n_gpus", "expected"), [(None, 2, 1), ("cuda", 0, 1), ("cpu", 2, 0), (None, 0, 0)]
)
def test_a_gpu_each_where_there_are_any(device: str | None, n_gpus: int, expected: int) -> None:
    cluster: Any = Cluster(8, n_gpus=n_gpus)
    spec = WorkerSpec("a store", "a model", device=device)
    assert ActorOptions.choose(cluster, spec, 2).num_gpus == expected

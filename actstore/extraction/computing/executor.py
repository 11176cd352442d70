"""Executors, which compute the segments of a run: finding an installed one by its name."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, cast

from actstore.errors import JobError
from actstore.extraction.computing.worker import WorkerSpec
from actstore.extraction.events import SegmentDone

GROUP = "actstore.executors"
"""Group of the entry points of executors; the package with the ray executor registers it here."""


@dataclass(frozen=True)
class Resources:
    """The resources that an executor may use."""

    num_workers: int | None = None
    ray_address: str | None = None


class Executor(Protocol):
    """A function that computes segments with workers made from a `WorkerSpec`."""

    def __call__(
        self,
        spec: WorkerSpec,
        pending: Sequence[int],
        resources: Resources,
        on_segment: Callable[[SegmentDone], None],
    ) -> None:
        """Compute all pending segments, call ``on_segment`` once for each, and return when all are committed.

        Raises:
            ActstoreError: the error of the first segment that failed for good. Segments committed before stay.
        """
        ...


def workers_here(name: str, resources: Resources) -> int | None:
    """Number of workers that an executor would start on this machine, which must have the memory and devices for them.

    None if they run elsewhere, or the number is not known: the module of an executor may have a function of this name.

    Raises:
        JobError: there is no such executor.
    """
    module = sys.modules[executor(name).__module__]
    count = getattr(module, "workers_here", None)
    return None if count is None else cast(int | None, count(resources))


def executor(name: str) -> Executor:
    """The executor of this name.

    Raises:
        JobError: there is no such executor.
    """
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in entries:
        raise JobError(f"executor {name!r} is not known; choose one of {', '.join(sorted(entries))}")
    return cast(Executor, entries[name].load())

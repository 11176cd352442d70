"""The seam between a run and whatever computes it: one function, found by name among the installed ones."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, cast

from actstore.errors import JobError
from actstore.extraction.computing.worker import WorkerSpec
from actstore.extraction.events import SegmentDone

GROUP = "actstore.executors"
"""Entry points of this group are executors; the package with the ray executor registers itself here."""


@dataclass(frozen=True)
class Resources:
    """What an executor may use."""

    num_workers: int | None = None
    ray_address: str | None = None


class Executor(Protocol):
    """Computes segments with workers made from a `WorkerSpec`."""

    def __call__(
        self,
        spec: WorkerSpec,
        pending: Sequence[int],
        resources: Resources,
        on_segment: Callable[[SegmentDone], None],
    ) -> None:
        """Return when all pending segments are committed; call ``on_segment`` once for each.

        Raises:
            ActstoreError: the first segment that failed for good; segments committed by then stay.
        """
        ...


def workers_here(name: str, resources: Resources) -> int | None:
    """Workers that an executor would start on this machine, which then must have the memory and devices for them. None
    where they are elsewhere, or that is not known: the module of an executor need not have a function of this name.

    Raises:
        JobError: there is no such executor.
    """
    module = sys.modules[executor(name).__module__]
    count = getattr(module, "workers_here", None)
    return None if count is None else cast(int | None, count(resources))


def executor(name: str) -> Executor:
    """The executor of this name.

    Raises:
        JobError: there is none.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        raise JobError(f"executor {name!r} is not known; choose one of {', '.join(sorted(found))}")
    return cast(Executor, found[name].load())

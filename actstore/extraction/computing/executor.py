"""Executors, which compute the units of work of a run: finding an installed one by its name.

To add an executor, write a function as `Executor` says (`actstore.extraction.computing.inline` is the shortest), and
name it in the pyproject.toml of its distribution, under the entry points ``actstore.executors``.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol, TypeVar, cast

from actstore.errors import JobError

GROUP = "actstore.executors"
"""Group of the entry points of executors; the package with the ray executor registers it here."""


@dataclass(frozen=True)
class Resources:
    """The resources that an executor may use."""

    num_workers: int | None = None
    ray_address: str | None = None


Done = TypeVar("Done")
Done_co = TypeVar("Done_co", covariant=True)


class Computes(Protocol[Done_co]):
    """A worker: it holds a model and computes units of work, such as the segments of a run."""

    def run(self, index: int) -> Done_co:
        """Compute the unit with this number. It is called from several threads at once."""
        ...

    def stop(self) -> None:
        """Let calls of `run` that are under way end soon."""
        ...

    def close(self) -> None:
        """End the threads of the worker."""
        ...


class Spec(Protocol[Done_co]):
    """What a worker needs to start on any machine: a frozen dataclass that can be pickled."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    unit: ClassVar[str]
    """What a unit of work is called in messages, such as ``segment``."""

    @property
    def device(self) -> str | None: ...

    @property
    def n_threads(self) -> int | None:
        """CPU threads of the forward; None leaves torch's choice."""
        ...

    def start(self) -> Computes[Done_co]:
        """Load the model."""
        ...


class Executor(Protocol):
    """A function that computes units of work with workers made from a `Spec`."""

    def __call__(
        self,
        spec: Spec[Done],
        pending: Sequence[int],
        resources: Resources,
        on_done: Callable[[Done], None],
    ) -> None:
        """Compute all pending units, call ``on_done`` once for each with what `Computes.run` returned, then return.

        Raises:
            ActstoreError: the error of the first unit that failed for good. What was done before stays.
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
    entries = _installed()
    if name not in entries:
        raise JobError(f"executor {name!r} is not known; choose one of {', '.join(sorted(entries))}")
    return cast(Executor, entries[name].load())


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    """The installed executors by name; the metadata of all that is installed is read for it."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}

"""Fleets: where the workers of a pool live, and how they are called."""

from collections.abc import Collection
from typing import Any, Literal, Protocol

from actstore.reason import reason

Call = int | Literal["place", "start"]
"""The number of a unit, or a step before the first unit: ``place`` answers once the worker has a place to run, with
its host and process; ``start`` loads the model.
"""


class WorkerRaisedError(Exception):
    """A call raised an error in a worker that lives on."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class WorkerLostError(Exception):
    """A worker has died, has lost its machine, or never got one. All its calls fail with this."""

    def __init__(self, cause: Exception, *, was_preempted: bool = False) -> None:
        super().__init__(f"{type(cause).__name__}: {reason(cause)}")
        self.was_preempted = was_preempted
        """Whether its machine was taken away, as spot machines are, and not by a fault of the worker."""


class Fleet(Protocol):
    """Starts, calls and ends workers. Workers and pending calls are whatever the fleet makes of them."""

    def size(self) -> int:
        """Number of workers that it has room for now."""
        ...

    def add(self) -> Any:
        """Begin to start a worker; it is returned at once."""
        ...

    def call(self, worker: Any, call: Call) -> Any:
        """Make a call and return at once, with what stands for the call. Calls of one worker run side by side."""
        ...

    def ended(self, calls: Collection[Any], timeout: float) -> list[Any]:
        """One or more of these calls that have ended; none if none has ended within so many seconds."""
        ...

    def result(self, call: Any) -> Any:
        """What an ended call returned.

        Raises:
            WorkerRaisedError: the call raised an error.
            WorkerLostError: the worker is gone.
        """
        ...

    def remove(self, worker: Any) -> None:
        """End a worker, whatever it is doing. Its calls end, too."""
        ...

    def wanting(self) -> str:
        """What workers that have no place yet are waiting for, such as ``2 GPUs each; the cluster has 1``."""
        ...

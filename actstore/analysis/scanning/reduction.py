"""Reductions: what is kept of the rows of a scan.

To add an analysis, write a `Reduction`: a frozen dataclass with what is asked for, which makes a `State` that takes
block after block. `scan` does the rest: reading, memory, workers, resuming.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from actstore.analysis.scanning.block import Block

Arrays = Mapping[str, NDArray[Any]]


class State(Protocol):
    """What is known of the rows so far."""

    def update(self, block: Block) -> None:
        """Take the rows of the next block of a unit."""
        ...

    def merge(self, other: Self) -> None:
        """Take what is known of rows that follow."""
        ...

    def arrays(self) -> Arrays:
        """All that is known, as named arrays of one dimension or more."""
        ...


class Reduction(Protocol):
    """What is asked of a scan. Objects are pickled on their way to workers, so they hold arrays and numbers only."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the stored hooks that are read."""
        ...

    def identity(self) -> str:
        """A text that differs for reductions that give other results: stored states are found by it."""
        ...

    def start(self) -> State:
        """The state before the first row."""
        ...

    def restore(self, arrays: Arrays) -> State:
        """A state from what `State.arrays` gave.

        Raises:
            ValueError: the arrays are of another form.
        """
        ...

    def finish(self, state: Any) -> Any:
        """The result of all rows."""
        ...


def hooks_of(reductions: Sequence[Reduction]) -> tuple[str, ...]:
    """The hooks of several reductions, each once."""
    return tuple(dict.fromkeys(hook for reduction in reductions for hook in reduction.hooks))

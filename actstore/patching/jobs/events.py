"""The event that a job reports while it goes on. The library prints nothing; it calls back."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PartDone:
    """One more part is computed and stored."""

    part: int
    n_pairs: int
    seconds: float
    """Time in which it was computed."""
    data: bytes = b""
    """The table of the part, on its way from the worker to storage; empty for those who are called back."""


OnEvent = Callable[[PartDone], None]


def ignore(_event: PartDone) -> None:
    """Ignore an event; the callback of callers that want none."""

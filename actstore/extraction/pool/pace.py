"""How long a worker may be silent before it is given up, judged by what the others have needed."""

from typing import Final

FACTOR: Final = 5
"""Factor on the longest time that any worker has needed so far."""
FLOOR_S = 120.0
"""Least seconds for a segment: failed requests to storage are repeated for a minute."""
ALONE_S = 1800.0
"""Least seconds for a segment if no worker has finished one yet, or none has since: all may be waiting for storage."""
START_FLOOR_S = 600.0
"""Least seconds to load the model, once another worker has loaded it."""
START_ALONE_S = 3600.0
"""Least seconds to load the model before any worker has: the first one may have to download it."""


class Pace:
    """The longest times that segments and starts have taken, in seconds."""

    def __init__(self) -> None:
        self.segment: float | None = None
        """Longest time from a worker's last sign of life to the end of its next segment; None before the first."""
        self.start: float | None = None
        """Longest time that loading the model has taken."""

    def finished(self, seconds: float) -> None:
        """Count a segment that ended so many seconds after the worker's last sign of life."""
        self.segment = max(seconds, self.segment or 0.0)

    def started(self, seconds: float) -> None:
        """Count a worker that took so many seconds to load the model."""
        self.start = max(seconds, self.start or 0.0)

    def deadline(self, n_attempts: int, *, is_alone: bool, loads_again: bool = False) -> float:
        """Return the seconds that a worker may be silent over its segments.

        Args:
            n_attempts: how many workers have been given up over one of them; each doubles the time, so that a slow
                worker gets through in the end.
            is_alone: whether all other workers are silent, too.
            loads_again: whether the first segment of the run is among them, for which a worker loads the whole model
                once more to check itself.
        """
        extra = self.start_deadline(n_attempts) if loads_again else 0.0
        if self.segment is None:
            return ALONE_S * 2.0**n_attempts + extra
        return max(ALONE_S if is_alone else FLOOR_S, FACTOR * self.segment) * 2.0**n_attempts + extra

    def start_deadline(self, n_attempts: int) -> float:
        """Return the seconds that loading the model may take after so many workers that were given up over it."""
        least = START_ALONE_S if self.start is None else max(START_FLOOR_S, FACTOR * self.start)
        return float(least * 2.0**n_attempts)

"""How long a worker may be silent before it is given up: by what the others have needed."""

from typing import Final

FACTOR: Final = 5
"""Times the longest that any worker has needed so far."""
FLOOR_S = 120.0
"""At least, for a segment: requests to storage that fail are repeated for a minute."""
ALONE_S = 1800.0
"""At least, where no worker has finished a segment yet, or none has since: then storage can be what all wait for."""
START_FLOOR_S = 600.0
"""At least, to load the model, once another worker has."""
START_ALONE_S = 3600.0
"""At least, to load the model, before any worker has: the first may have to download it."""


class Pace:
    """What segments and starts have taken, in seconds."""

    def __init__(self) -> None:
        self.segment: float | None = None
        """The longest from a worker's last word to the end of its next segment; None before the first."""
        self.start: float | None = None
        """The longest that loading the model has taken."""

    def finished(self, seconds: float) -> None:
        """A worker has finished a segment, so long after its last word."""
        self.segment = max(seconds, self.segment or 0.0)

    def started(self, seconds: float) -> None:
        """A worker has loaded the model."""
        self.start = max(seconds, self.start or 0.0)

    def deadline(self, n_attempts: int, *, is_alone: bool, loads_again: bool = False) -> float:
        """Seconds that a worker may be silent over its segments.

        Args:
            n_attempts: how many workers have been given up over one of them; each time it is twice as long, so that a
                worker that is only slow gets through.
            is_alone: whether no other worker moves, either.
            loads_again: whether the first segment of the run is among them, for which a worker loads the whole model
                once more to check itself.
        """
        extra = self.start_deadline(n_attempts) if loads_again else 0.0
        if self.segment is None:
            return ALONE_S * 2.0**n_attempts + extra
        return max(ALONE_S if is_alone else FLOOR_S, FACTOR * self.segment) * 2.0**n_attempts + extra

    def start_deadline(self, n_attempts: int) -> float:
        """Seconds that loading the model may take, after so many workers that were given up over it."""
        least = START_ALONE_S if self.start is None else max(START_FLOOR_S, FACTOR * self.start)
        return float(least * 2.0**n_attempts)

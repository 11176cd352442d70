"""Progress of a generation on stderr: a bar on a terminal, plain lines elsewhere."""

import time

from actstore.cli.showing.live_line import LiveLine, OnLine, clock
from actstore.counted import counted
from actstore.generating.run import PartDone


class GenerateProgress(OnLine):
    """Shows events. Use it as a context manager, and pass `on_event` to the library."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = LiveLine("loading", quiet=quiet)
        self._done = 0
        self._n_tokens = 0
        self._started = 0.0

    def on_event(self, event: PartDone) -> None:
        """Show one event."""
        if not self._done:
            self._line.begin("generating", event.n_pending)
            self._started = time.monotonic() - event.seconds
        self._done += event.n_continuations
        self._n_tokens += event.n_tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{self._n_tokens / seconds:,.0f} tokens/s"
        left = seconds / self._done * (event.n_pending - self._done)
        self._line.show(
            rate,
            f"generated {self._done / event.n_pending:.0%}: {self._done:,} of "
            f"{counted(event.n_pending, 'continuation')}, {rate}, {clock(left)} left",
            done=self._done,
            last=self._done == event.n_pending,
        )

"""Progress of a patching job on stderr: a bar on a terminal, plain lines elsewhere, or one JSON object a line."""

import time
from types import TracebackType
from typing import Self

from actstore.cli.showing.json_document import print_json
from actstore.cli.showing.live_line import LiveLine, clock
from actstore.counted import counted
from actstore.patching.jobs.events import PartDone


class PatchProgress:
    """Shows events. Use it as a context manager, and pass `on_event` to the library."""

    def __init__(self, n_pairs: int, *, quiet: bool = False, as_json: bool = False) -> None:
        """
        Args:
            n_pairs: pairs left to patch.
            quiet: show nothing.
            as_json: one line of JSON for each part.
        """
        self._n_pairs = n_pairs
        self._is_json = as_json and not quiet
        self._line = LiveLine("loading", quiet=quiet or as_json)
        self._started = 0.0
        self._done = 0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._line.__enter__()
        self._line.begin("patching", self._n_pairs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.__exit__(kind, error, trace)

    def on_event(self, event: PartDone) -> None:
        """Show one event."""
        now = time.monotonic()
        if not self._done:
            # The rate is that of the work, without the time that workers took to start.
            self._started = max(self._started, now - event.seconds)
        self._done += event.n_pairs
        seconds = max(now - self._started, 1e-9)
        rate = self._done / seconds
        left = (self._n_pairs - self._done) / rate
        if self._is_json:
            figures = {"part": event.part, "n_pairs": event.n_pairs, "seconds": event.seconds}
            progress = {"n_pairs_done": self._done, "n_pairs_to_do": self._n_pairs}
            rates = {"pairs_per_second": rate, "seconds_left": left}
            print_json(figures | progress | rates, indent=None, err=True)
        self._line.show(
            f"{rate:,.2f} pairs/s",
            f"patched {self._done / self._n_pairs:.0%}: {self._done:,} of {counted(self._n_pairs, 'pair')}, "
            f"{rate:,.2f} pairs/s, {clock(left)} left",
            done=self._done,
            last=self._done == self._n_pairs,
        )

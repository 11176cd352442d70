"""Progress of an extraction on stderr: a bar on a terminal, plain lines elsewhere."""

import time

from actstore.cli.showing.live_line import LiveLine, OnLine, clock
from actstore.counted import counted
from actstore.extraction.events import Event, SegmentDone, Tokenised


class Progress(OnLine):
    """Shows events. Use it as a context manager, and pass `on_event` to the library."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = LiveLine("tokenising", quiet=quiet)
        self._started = 0.0
        self._n_sequences = 0
        self._done = 0
        self._nbytes = 0
        self._n_tokens = 0
        self._n_rows = 0

    def start(self, n_sequences: int) -> None:
        """Begin an extraction with so many sequences left to compute."""
        self._n_sequences = n_sequences
        self._started = time.monotonic()
        self._line.begin("extracting", n_sequences)

    def on_event(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Tokenised):
            cut = f", {counted(event.n_truncated, 'document')} cut" if event.n_truncated else ""
            self._line.show(
                f"{counted(event.n_tokens, 'token')}{cut}",
                f"tokenised {counted(event.n_tokens, 'token')}{cut}",
            )
        else:
            self._segment(event)

    def _segment(self, event: SegmentDone) -> None:
        if not self._done:
            # The rate is that of the work, without the time that workers took to start.
            self._started = max(
                self._started, time.monotonic() - event.seconds_forward - event.seconds_writing
            )
        self._done += event.n_sequences
        self._nbytes += event.nbytes
        self._n_tokens += event.n_tokens
        self._n_rows += event.n_rows
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{self._n_tokens / seconds:,.0f} tokens/s, {self._nbytes / 1e6 / seconds:,.1f} MB/s"
        rows = f", {counted(self._n_rows, 'row')} of each hook" if self._n_rows < self._n_tokens else ""
        left = seconds / self._done * max(0, self._n_sequences - self._done)
        share = self._done / max(self._n_sequences, self._done)
        self._line.show(
            rate,
            f"extracted {share:.0%}: {self._done:,} of {counted(self._n_sequences, 'sequence')}{rows}, {rate}, "
            f"{clock(left)} left",
            done=self._done,
            last=self._done == self._n_sequences,
        )

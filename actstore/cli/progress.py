"""Progress of a run on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

import click

from actstore.extraction.events import Event, SegmentDone, Tokenised

_LINE_EVERY_S = 5.0


class Progress:
    """Shows events. Use it as a context manager, and pass `on_event` to the library."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0
        self._started = 0.0
        self._n_sequences = 0
        self._done = 0
        self._nbytes = 0
        self._length = 0

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("tokenising", total=None, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, n_sequences: int, context_length: int) -> None:
        """Begin an extraction with so many sequences left to compute."""
        self._n_sequences, self._length = n_sequences, context_length
        self._started = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description="extracting", total=n_sequences, completed=0)

    def on_event(self, event: Event) -> None:
        """Show one event."""
        if self._quiet:
            return
        if isinstance(event, Tokenised):
            self._show(f"{event.n_tokens:,} tokens", f"tokenised {event.n_tokens:,} tokens")
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
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (
            f"{self._done * self._length / seconds:,.0f} tokens/s, {self._nbytes / 1e6 / seconds:,.1f} MB/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        left = seconds / self._done * max(0, self._n_sequences - self._done)
        share = self._done / max(self._n_sequences, self._done)
        self._show(
            rate,
            f"extracted {share:.0%}: {self._done:,} of {self._n_sequences:,} sequences, {rate}, "
            f"{_clock(left)} left",
            last=self._done == self._n_sequences,
        )

    def _show(self, rate: str, line: str, *, last: bool = False) -> None:
        if self._bar is not None:
            self._bar.update(self._task, rate=rate)
        elif last or time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            click.echo(line, err=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

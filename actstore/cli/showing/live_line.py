"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

import click

_LINE_EVERY_S = 5.0


class LiveLine:
    """Shows how far a run is. It is a context manager."""

    def __init__(self, description: str, *, quiet: bool = False) -> None:
        """
        Args:
            description: what is done first.
            quiet: show nothing.
        """
        self.is_quiet = quiet
        self._description = description
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if not self.is_quiet and sys.stderr.isatty():
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
            self._task = self._bar.add_task(self._description, total=None, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, description: str, total: int) -> None:
        """Begin what is counted up to ``total``."""
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=description, total=total, completed=0)

    def show(self, rate: str, line: str, *, done: int | None = None, last: bool = False) -> None:
        """Show where the run is.

        Args:
            rate: text beside the bar.
            line: the line where there is no bar; it is left out soon after another one.
            done: how much of the total is done.
            last: whether the line is shown in any case.
        """
        if self.is_quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, rate=rate, **({} if done is None else {"completed": done}))
        elif last or time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            click.echo(line, err=True)


def clock(seconds: float) -> str:
    """A time as minutes and seconds, such as 3:05, or 1:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class OnLine:
    """Makes a class that shows its events on a `LiveLine` a context manager."""

    _line: LiveLine

    def __enter__(self) -> Self:
        self._line.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.__exit__(kind, error, trace)

"""Progress in bytes: lines on stderr from time to time."""

import time

import click

_LINE_EVERY_S = 5.0


class ByteProgress:
    """Reports progress; pass `add` to the library."""

    def __init__(self, verb: str, total: int | None) -> None:
        """``total`` is the approximate number of bytes in all, or None if it is not known."""
        self._verb = verb
        self._total = total
        self._started = self._last_line = time.monotonic()
        self._nbytes = 0

    def add(self, nbytes: int) -> None:
        """Count one more object of so many bytes."""
        self._nbytes += nbytes
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY_S:
            return
        self._last_line = now
        rate = self._nbytes / max(now - self._started, 1e-9)
        of, left = "", ""
        if self._total:
            of = f" of {self._total / 1e6:,.0f}"
            left = f", {max(self._total - self._nbytes, 0) / rate:,.0f} s left"
        click.echo(f"{self._verb} {self._nbytes / 1e6:,.1f}{of} MB, {rate / 1e6:,.0f} MB/s{left}", err=True)

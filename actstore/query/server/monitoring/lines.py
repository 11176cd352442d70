"""Writes lines of logs in a thread, so that a slow reader of a log does not hold up the event loop."""

import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

_MAX_NBYTES: Final = 4 << 20
"""Bytes of lines that wait to be written, at most."""
_FLUSH_S: Final = 2.0
"""Seconds to wait for unwritten lines at the end."""


class LineWriter:
    """Writes lines to a file in order, each at once, so that processes can share it. Lines for which there is no room,
    or that cannot be written, are dropped, and a line says how many.
    """

    def __init__(
        self,
        descriptor: int,
        dropped_line: Callable[[int], bytes],
        count: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            descriptor: descriptor of the file, which is left open.
            dropped_line: makes the line that says how many were dropped.
            count: called with 1 for each dropped line.
        """
        self._descriptor = descriptor
        self._dropped_line = dropped_line
        self._count = count
        self._lines: deque[bytes] = deque()
        self._nbytes = 0
        self._n_dropped = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, line: bytes) -> None:
        """Have a line written, without waiting for it.

        Args:
            line: bytes of the line, with its line break.
        """
        with self._changed:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            is_dropped = self._is_closed or self._nbytes + len(line) > _MAX_NBYTES
            if not is_dropped:
                self._lines.append(line)
                self._nbytes += len(line)
                self._changed.notify_all()
        if is_dropped:
            self._drop()

    def flush(self) -> None:
        """Wait a little for lines that are not written yet."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, _FLUSH_S)

    def close(self) -> None:
        """Wait a little for lines that are not written yet, and drop those that come later."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self.flush()

    def _drop(self) -> None:
        with self._changed:
            self._n_dropped += 1
        if self._count is not None:
            self._count(1)

    def _run(self) -> None:
        while (line := self._next()) is not None:
            try:
                self._write(line)
                self._report_dropped()
            except OSError:  # a full disk takes no lines; requests are answered all the same
                self._drop()
            with self._changed:
                self._lines.popleft()
                self._nbytes -= len(line)
                self._changed.notify_all()

    def _next(self) -> bytes | None:
        """The first waiting line, which stays in the queue until it is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._is_closed)
            return self._lines[0] if self._lines else None

    def _report_dropped(self) -> None:
        with self._changed:
            n_dropped = self._n_dropped
        if n_dropped:
            self._write(self._dropped_line(n_dropped))
            with self._changed:
                self._n_dropped -= n_dropped

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:
                # The descriptor is shared and non-blocking, as whoever opened it wants.
                select.select([], [self._descriptor], [])


class StderrHandler(logging.Handler):
    """A logging handler that writes to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._writer = LineWriter(sys.stderr.fileno(), _dropped_line)

    def emit(self, record: logging.LogRecord) -> None:
        """Implements `logging.Handler.emit`."""
        try:
            self._writer.write(self.format(record).encode(errors="replace") + b"\n")
        except Exception:  # noqa: BLE001 - as all handlers of logging do
            self.handleError(record)

    def flush(self) -> None:
        """Implements `logging.Handler.flush`: wait a little for lines that are not written yet."""
        self._writer.flush()


def _dropped_line(n_dropped: int) -> bytes:
    return f"{n_dropped} lines of this log were dropped, as nobody took them in time\n".encode()

"""Progress of fitting probes on stderr: the scan, then the hooks that are done."""

import time

from actstore.analysis.scanning.scan import Progress
from actstore.cli.showing.live_line import LiveLine, OnLine, clock


class ProbeProgress(OnLine):
    """Shows events. Use it as a context manager, and pass `on_progress` and `on_hooks` to the library."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = LiveLine("reading", quiet=quiet)
        self._scans = 0
        self._is_scanning = False
        self._started = 0.0

    def on_progress(self, progress: Progress) -> None:
        """Show how far a scan is."""
        total = progress.n_sequences_in_all
        if not self._is_scanning:
            self._is_scanning = True
            self._scans += 1
            self._line.begin("reading", total)
        rate = f"{progress.n_rows / max(progress.seconds, 1e-9):,.0f} rows/s"
        left = "" if progress.seconds_left is None else f", {clock(progress.seconds_left)} left"
        again = f" (pass {self._scans})" if self._scans > 1 else ""
        is_last = progress.n_sequences == total
        self._line.show(
            rate,
            f"read {progress.n_sequences / total:.0%}: {progress.n_sequences:,} of {total:,} sequences{again}, "
            f"{rate}{left}",
            done=progress.n_sequences,
            last=is_last,
        )
        if is_last:
            self._is_scanning = False
            self._started = time.monotonic()

    def on_hooks(self, n_done: int, n_hooks: int) -> None:
        """Show how many hooks are done."""
        if n_done == 1:
            self._line.begin("fitting", n_hooks)
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = seconds / n_done * (n_hooks - n_done)
        self._line.show(
            f"{n_done / seconds:,.2f} hooks/s",
            f"fitted {n_done:,} of {n_hooks:,} hooks, {clock(left)} left",
            done=n_done,
            last=n_done == n_hooks,
        )

"""Progress of a scan on stderr: a bar on a terminal, plain lines elsewhere."""

from actstore.analysis.scanning.scan import Progress
from actstore.cli.showing.live_line import LiveLine, OnLine, clock


class ScanProgress(OnLine):
    """Shows how far a scan is. Use it as a context manager, and pass `on_progress` to the library."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = LiveLine("scanning", quiet=quiet)
        self._has_begun = False

    def on_progress(self, progress: Progress) -> None:
        """Show one event."""
        if not self._has_begun:
            self._has_begun = True
            self._line.begin("scanning", progress.n_sequences_in_all)
        rate = f"{progress.n_rows / max(progress.seconds, 1e-9):,.0f} rows/s"
        left = "" if progress.seconds_left is None else f", {clock(progress.seconds_left)} left"
        self._line.show(
            rate,
            f"scanned {progress.n_sequences / progress.n_sequences_in_all:.0%}: {progress.n_sequences:,} of "
            f"{progress.n_sequences_in_all:,} sequences, {rate}{left}",
            done=progress.n_sequences,
            last=progress.n_sequences == progress.n_sequences_in_all,
        )

"""Progress of a dashboard on stderr: the scan, and the pages that follow it."""

import time

from actstore.cli.showing.live_line import clock
from actstore.cli.showing.scan_progress import ScanProgress


class DashboardProgress(ScanProgress):
    """Shows progress. Use it as a context manager, and pass `on_progress` and `on_page` to the library."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._pages_since: float | None = None

    def on_page(self, n_done: int, n_pages: int) -> None:
        """Show how many pages are written."""
        now = time.monotonic()
        if self._pages_since is None:
            self._pages_since = now
            self._line.begin("writing pages", n_pages)
        seconds = max(now - self._pages_since, 1e-9)
        rate = f"{n_done / seconds:,.0f} pages/s"
        self._line.show(
            rate,
            f"wrote {n_done:,} of {n_pages:,} pages, {clock(seconds / n_done * (n_pages - n_done))} left",
            done=n_done,
            last=n_done == n_pages,
        )

"""Progress of an analysis on stderr: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from actstore.cli.showing.live_line import LiveLine, OnLine, clock

if TYPE_CHECKING:
    from actstore.analysis.sae_evaluation.losses import LossProgress
    from actstore.analysis.scanning.scan import Progress


class AnalysisProgress(OnLine):
    """Shows scans, and what comes before and after them. Use it as a context manager, and pass its methods to the
    library.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = LiveLine("loading", quiet=quiet)
        self._doing = ""
        self._n_scans = 0
        self._last_event = time.monotonic()

    def on_progress(self, progress: "Progress") -> None:
        """Show how far a scan is."""
        if self._doing != "scanning":
            self._n_scans += 1
        rate = progress.n_rows / max(progress.seconds, 1e-9)
        self._show(
            "scanning",
            "scanned",
            progress.n_sequences,
            progress.n_sequences_in_all,
            "sequences" if self._n_scans < 2 else f"sequences (pass {self._n_scans})",
            f"{rate:,.0f} rows/s",
            progress.seconds_left,
        )

    def on_losses(self, progress: "LossProgress") -> None:
        """Show how far a model has read tokens."""
        self._show(
            "running the model",
            "computed",
            progress.n_tokens,
            progress.n_tokens_in_all,
            "tokens",
            f"{progress.tokens_per_second:,.0f} tokens/s",
            progress.seconds_left,
        )

    def counting(self, doing: str, done: str, units: str) -> Callable[[int, int], None]:
        """What shows how many of some units are done.

        Args:
            doing: what is done to them, such as writing.
            done: the same when it is done, such as wrote.
            units: what they are, such as pages.
        """
        started = 0.0

        def on_done(n_done: int, n_in_all: int) -> None:
            nonlocal started
            if self._doing != doing:
                started = self._last_event
            seconds = max(time.monotonic() - started, 1e-9)
            rate = f"{n_done / seconds:,.1f} {units}/s"
            self._show(doing, done, n_done, n_in_all, units, rate, seconds / n_done * (n_in_all - n_done))

        return on_done

    def _show(
        self,
        doing: str,
        done: str,
        n_done: int,
        n_in_all: int,
        units: str,
        rate: str,
        seconds_left: float | None,
    ) -> None:
        if doing != self._doing:
            self._line.begin(doing, n_in_all)
        is_last = n_done == n_in_all
        self._doing = "" if is_last else doing
        left = "" if seconds_left is None else f", {clock(seconds_left)} left"
        self._line.show(
            rate,
            f"{done} {n_done / n_in_all:.0%}: {n_done:,} of {n_in_all:,} {units}, {rate}{left}",
            done=n_done,
            last=is_last,
        )
        self._last_event = time.monotonic()

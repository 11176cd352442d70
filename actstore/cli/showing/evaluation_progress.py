"""Progress of an evaluation of SAEs on stderr: tokens that a model reads, then rows of the store."""

import json

import click

from actstore.analysis.sae_evaluation.losses import LossProgress
from actstore.analysis.scanning.scan import Progress
from actstore.cli.showing.live_line import LiveLine, OnLine, clock


class EvaluationProgress(OnLine):
    """Shows both. Use it as a context manager, and pass its methods to the library."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        """
        Args:
            quiet: show nothing.
            as_json: one line of JSON for each step.
        """
        self._is_json = as_json and not quiet
        self._line = LiveLine("loading", quiet=quiet or as_json)
        self._doing = ""

    def on_losses(self, progress: LossProgress) -> None:
        """Show how far the model is."""
        left = progress.seconds_left
        if self._is_json:
            counts = {"n_tokens_done": progress.n_tokens, "n_tokens_to_do": progress.n_tokens_in_all}
            self._as_json(counts | {"tokens_per_second": progress.tokens_per_second, "seconds_left": left})
        self._show(
            "model",
            f"{progress.tokens_per_second:,.0f} tokens/s",
            "tokens",
            progress.n_tokens,
            progress.n_tokens_in_all,
            left,
        )

    def on_scan(self, progress: Progress) -> None:
        """Show how far the store is read."""
        rate = progress.n_rows / progress.seconds if progress.seconds else 0.0
        left = progress.seconds_left
        if self._is_json:
            counts = {
                "n_sequences_done": progress.n_sequences,
                "n_sequences_to_do": progress.n_sequences_in_all,
            }
            self._as_json(counts | {"rows_per_second": rate, "seconds_left": left})
        self._show(
            "store",
            f"{rate:,.0f} rows/s",
            "sequences",
            progress.n_sequences,
            progress.n_sequences_in_all,
            left,
        )

    def _as_json(self, figures: dict[str, float | None]) -> None:
        click.echo(json.dumps(figures), err=True)

    def _show(
        self, doing: str, rate: str, units: str, n_done: int, n_to_do: int, seconds_left: float | None
    ) -> None:
        if doing != self._doing:
            self._line.begin(doing, n_to_do)
            self._doing = doing
        left = "" if seconds_left is None else f", {clock(seconds_left)} left"
        self._line.show(
            rate,
            f"{doing} {n_done / n_to_do:.0%}: {n_done:,} of {n_to_do:,} {units}, {rate}{left}",
            done=n_done,
            last=n_done == n_to_do,
        )

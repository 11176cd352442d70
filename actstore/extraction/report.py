"""What a run did, in figures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from actstore.store.format.plan import FIRST_RUN
from actstore.store.statistics.not_finite import NotFinite, add_up

_SHOWN: Final = 10
"""Hooks that are named one by one."""


@dataclass(frozen=True)
class Report:
    """Result of `actstore.extract`; print it for a table."""

    url: str
    run: str
    """Name of the run within the store."""
    n_segments: int
    n_segments_before: int
    """Committed by earlier runs; nothing of these was computed again."""
    n_tokens: int
    """In the store, padding not counted."""
    n_tokens_computed: int
    """By this run, padding counted."""
    nbytes_written: int
    """By this run, of activations."""
    n_retries: int
    """Requests to storage that failed for a passing reason and were repeated."""
    seconds: float
    """Wall time of this run without tokenising: start-up, forward, writing, and the end: executor and store are closed,
    and storage is read back."""
    seconds_tokenising: float
    seconds_forward: float
    """Sum over workers, in the model."""
    seconds_waiting: float
    """Sum over workers: the model stood still because storage was slower."""
    seconds_running: float
    """Wall time from the first segment's start of work to the last commit: neither start-up nor the end is counted."""

    not_finite: Mapping[str, NotFinite] = field(default_factory=dict)
    """By hook that has them: tokens of the whole run with NaN or infinity, as the model computed them. Attention
    patterns and scores: of the segments that were computed now."""

    def __add__(self, other: "Report") -> "Report":
        """Of two runs of a store, one after the other."""
        rest = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name not in ("url", "run", "not_finite")
        }
        found = add_up(self.not_finite, other.not_finite)
        return Report(url=self.url, run=f"{self.run} and {other.run}", not_finite=found, **rest)

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens_computed / self.seconds_running if self.seconds_running else 0.0

    @property
    def nbytes_per_second(self) -> float:
        return self.nbytes_written / self.seconds_running if self.seconds_running else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and rates as plain data."""
        rates = {"tokens_per_second": self.tokens_per_second, "nbytes_per_second": self.nbytes_per_second}
        return asdict(self) | rates

    def __str__(self) -> str:
        if self.n_segments == self.n_segments_before:
            return table(
                {
                    "store": f"{self.url} (complete before: nothing to do)",
                    "tokens": f"{self.n_tokens:,}",
                }
                | self._not_finite_rows()
            )
        before = f", {self.n_segments_before} of them by earlier runs" if self.n_segments_before else ""
        run = "" if self.run == FIRST_RUN else f"run {self.run} "
        retries = f", {self.n_retries} requests repeated" if self.n_retries else ""
        return table(
            {
                "store": f"{self.url} ({run}complete: {self.n_segments} segments{before})",
                "tokens": f"{self.n_tokens:,} stored, {self.n_tokens_computed:,} computed now",
                "written": f"{self.nbytes_written / 1e6:,.1f} MB of activations{retries}",
                "rate": f"{self.tokens_per_second:,.0f} tokens/s, {self.nbytes_per_second / 1e6:,.1f} MB/s",
                "time": f"{self.seconds_tokenising:.1f} s tokenising, {self.seconds_forward:.1f} s in the forward, "
                f"{self.seconds_waiting:.1f} s waiting for writes, {self.seconds:.1f} s in all",
            }
            | self._not_finite_rows()
        )

    def _not_finite_rows(self) -> dict[str, str]:
        lines = [f"{name}: {found}" for name, found in self.not_finite.items()]
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more hooks"]
        return {"NaN or infinity": "\n".join(lines)} if lines else {}


def table(rows: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name in rows)
    indent = "\n" + " " * (width + 2)
    return "\n".join(f"{name:<{width}}  {value}".replace("\n", indent) for name, value in rows.items())

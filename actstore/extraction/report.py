"""The report of a run, in figures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from actstore.counted import counted
from actstore.store.format.plan import FIRST_RUN
from actstore.store.statistics.not_finite import NotFinite, add_up

_SHOWN: Final = 10
"""Number of hooks that are named one by one."""


@dataclass(frozen=True)
class Report:
    """Result of `actstore.extract`; print it for a table."""

    url: str
    run: str
    """Name of the run within the store."""
    n_segments: int
    n_segments_before: int
    """Number of segments that were committed by earlier calls, and not computed again."""
    n_tokens: int
    """Number of tokens in the store, without padding."""
    n_tokens_computed: int
    """Number of tokens that this call computed, without padding."""
    n_rows: int
    """Number of rows of each hook in the store: a row for each chosen position, or for each token."""
    nbytes_written: int
    """Bytes of activations that this call wrote."""
    n_retries: int
    """Number of requests to storage that failed for a transient reason and were repeated."""
    seconds: float
    """Wall time of this call without tokenising: start-up, forward, writing, closing, and reading back from storage."""
    seconds_tokenising: float
    seconds_forward: float
    """Time in the model, summed over workers."""
    seconds_waiting: float
    """Time in which the model waited for storage, summed over workers."""
    seconds_running: float
    """Wall time from the start of the first segment to the last commit, without start-up and closing."""
    n_truncated: int = 0
    """Number of documents in the store that were cut, since they are longer than a sequence."""
    n_tokens_cut: int = 0
    """Number of tokens that were cut off them."""

    not_finite: Mapping[str, NotFinite] = field(default_factory=dict)
    """Tokens of the whole run with NaN or infinity, for each hook that has any, as the model computed them. Attention
    patterns and scores count only in segments that were computed now."""

    def __add__(self, other: "Report") -> "Report":
        """The report of two runs of a store, one after the other."""
        rest = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name not in ("url", "run", "not_finite")
        }
        not_finite = add_up(self.not_finite, other.not_finite)
        return Report(url=self.url, run=f"{self.run} and {other.run}", not_finite=not_finite, **rest)

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens_computed / self.seconds_running if self.seconds_running else 0.0

    @property
    def nbytes_per_second(self) -> float:
        return self.nbytes_written / self.seconds_running if self.seconds_running else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and the rates as plain data."""
        rates = {"tokens_per_second": self.tokens_per_second, "nbytes_per_second": self.nbytes_per_second}
        return asdict(self) | rates

    def __str__(self) -> str:
        if self.n_segments == self.n_segments_before:
            return table(
                {
                    "store": f"{self.url} (complete before: nothing to do)",
                    "tokens": f"{self.n_tokens:,}",
                }
                | self._chosen_rows()
                | self._cut_rows()
                | self._not_finite_rows()
            )
        before = f", {self.n_segments_before} of them by earlier attempts" if self.n_segments_before else ""
        run = "" if self.run == FIRST_RUN else f"run {self.run} "
        retries = f", {counted(self.n_retries, 'request')} repeated" if self.n_retries else ""
        return table(
            {
                "store": f"{self.url} ({run}complete: {counted(self.n_segments, 'segment')}{before})",
                "tokens": f"{self.n_tokens:,} stored, {self.n_tokens_computed:,} computed now",
                **self._chosen_rows(),
                **self._cut_rows(),
                "written": f"{self.nbytes_written / 1e6:,.1f} MB of activations{retries}",
                "rate": f"{self.tokens_per_second:,.0f} tokens/s, {self.nbytes_per_second / 1e6:,.1f} MB/s",
                "time": f"{self.seconds_tokenising:.1f} s tokenising, {self.seconds_forward:.1f} s in the forward, "
                f"{self.seconds_waiting:.1f} s waiting for writes, {self.seconds:.1f} s in all",
            }
            | self._not_finite_rows()
        )

    def _chosen_rows(self) -> dict[str, str]:
        """The line about chosen positions; none if all are stored."""
        return {"rows": f"{self.n_rows:,} of each hook"} if self.n_rows != self.n_tokens else {}

    def _cut_rows(self) -> dict[str, str]:
        return {"cut": cut(self.n_truncated, self.n_tokens_cut)} if self.n_truncated else {}

    def _not_finite_rows(self) -> dict[str, str]:
        lines = [f"{name}: {tokens}" for name, tokens in self.not_finite.items()]
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more hooks"]
        return {"NaN or infinity": "\n".join(lines)} if lines else {}


def cut(n_truncated: int, n_tokens_cut: int) -> str:
    """A line about documents that were cut."""
    documents = counted(n_truncated, "document")
    tokens = counted(n_tokens_cut, "token")
    return f"{tokens} of {documents}"


def table(rows: Mapping[str, str]) -> str:
    """A table of names and values in two columns."""
    width = max(len(name) for name in rows)
    indent = "\n" + " " * (width + 2)
    return "\n".join(f"{name:<{width}}  {value}".replace("\n", indent) for name, value in rows.items())

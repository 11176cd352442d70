"""The report of a job, in figures."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from actstore.counted import counted
from actstore.errors import StorageError
from actstore.extraction.report import table

REPORT: Final = "report.json"
"""Key of the report. It is written last: where it is, the job is complete."""


@dataclass(frozen=True)
class PatchReport:
    """Result of `run_job`; print it for a table."""

    url: str
    metric: str
    n_pairs: int
    n_parts: int
    n_parts_before: int
    """Number of parts that earlier calls computed."""
    n_cells: int
    n_skipped: int
    """Cells that change nothing, and so have exactly the metric of the corrupted run."""
    clean: float
    """Mean metric of the clean runs."""
    corrupted: float
    """Mean metric of the corrupted runs."""
    engines: Mapping[str, int]
    """Number of pairs that each engine has computed; see `PatchResult.engine`."""
    noise_floor: float
    """See `PatchResult.noise_floor`; the largest of all parts."""
    summaries: Mapping[str, int]
    """Number of pairs in each mean, by the name of its files without suffix."""
    seconds: float
    """Time of the call that completed the job, with loading the model."""
    pairs_per_second: float
    """Pairs that this call computed, by the time from the start of the first of its parts to the end of the last."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data."""
        return asdict(self)

    def to_bytes(self) -> bytes:
        """The file that is stored."""
        return (json.dumps(self.to_dict(), indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Parse a report that was read from ``where``.

        Raises:
            StorageError: it is none.
        """
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise StorageError(f"{where} is damaged; delete it, and run the same command again") from error

    def __str__(self) -> str:
        parts = counted(self.n_parts, "part")
        before = f", {self.n_parts_before} of them by earlier runs" if self.n_parts_before else ""
        skipped = f", of which {self.n_skipped:,} change nothing" if self.n_skipped else ""
        engines = "; ".join(f"{counted(n, 'pair')} as {engine}" for engine, n in self.engines.items())
        return table(
            {
                "results": f"{self.url} (complete: {parts}{before})",
                "cells": f"{self.n_cells:,} of {counted(self.n_pairs, 'pair')}{skipped}",
                self.metric: f"{self.clean:.4g} clean, {self.corrupted:.4g} corrupted, on average",
                "engine": f"{engines}; noise floor {self.noise_floor:.1g}",
                "means": ", ".join(f"{name} of {counted(n, 'pair')}" for name, n in self.summaries.items()),
                "rate": f"{self.pairs_per_second:,.2f} pairs/s, {self.seconds:.1f} s in all",
            }
        )

"""What all benchmarks share: a ratio of two figures taken in turns in one run, as medians."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_HEAD = ("benchmark", "actstore", "compared with", "ratio", "target", "")


@dataclass(frozen=True)
class Ratio:
    """Ours over the limit or the peer, in the same unit."""

    name: str
    ours: float
    other: float
    unit: str
    target: float
    against: str
    lower_is_better: bool = False
    """The figure itself is compared with the target; there is no peer."""

    @property
    def value(self) -> float:
        return self.ours if self.lower_is_better else self.ours / self.other

    @property
    def is_met(self) -> bool:
        return self.value <= self.target if self.lower_is_better else self.value >= self.target

    def row(self) -> tuple[str, str, str, str, str, str]:
        """Cells of a table."""
        if self.lower_is_better:
            return (
                self.name,
                f"{self.ours:.3g} {self.unit}",
                "-",
                "-",
                f"<= {self.target:g}",
                self._verdict(),
            )
        return (
            self.name,
            f"{self.ours:,.4g} {self.unit}",
            f"{self.other:,.4g} {self.unit} ({self.against})",
            f"{self.value:.3g}",
            f">= {self.target:g}",
            self._verdict(),
        )

    def _verdict(self) -> str:
        return "met" if self.is_met else "missed"


def in_turns(ours: Callable[[], float], other: Callable[[], float], *, repeats: int) -> tuple[float, float]:
    """Medians of two measurements, taken one after the other so that a noisy neighbour hits both."""
    pairs = []
    for turn in range(repeats):
        # Each goes first half of the time: the first of a pair finds the caches of the last.
        pairs.append((ours(), other()) if turn % 2 == 0 else tuple(reversed((other(), ours()))))
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def all_in_turns(measurements: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, float]:
    """Medians of several measurements, in rounds that each begin with another one."""
    figures: dict[str, list[float]] = {name: [] for name in measurements}
    names = list(measurements)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            figures[name].append(measurements[name]())
    return {name: statistics.median(found) for name, found in figures.items()}


def table(ratios: Sequence[Ratio]) -> str:
    """As Markdown, its columns aligned."""
    rows = [_HEAD, *(ratio.row() for ratio in ratios)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"

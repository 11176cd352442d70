"""What all benchmarks share: measuring sides in turns, and printing the figures of a run."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

TURNS: Final = 5
TURN_S: Final = 1.0
"""Least seconds of a turn, so that every side runs for five seconds: shorter runs measure start-up, and one pause of a
busy machine would decide.
"""
_SPEED_HEAD: Final = ("benchmark", "actstore", "against", "their figure", "ratio (turns)", "target", "")
_FIGURE_HEAD: Final = ("benchmark", "figure", "target", "")


@dataclass(frozen=True)
class Work:
    """An amount of work of one call, and the seconds that it took, without warm-up."""

    amount: float
    seconds: float


Side = Callable[[], Work]


def timed(act: Callable[[], float]) -> Side:
    """Time the whole of an act, which returns the amount of its work."""

    def work() -> Work:
        started = time.perf_counter()
        amount = act()
        return Work(amount, time.perf_counter() - started)

    return work


@dataclass(frozen=True)
class Rates:
    """Amounts per second of one side."""

    of_turns: tuple[float, ...]
    seconds: float
    """Seconds of all turns together."""

    @property
    def median(self) -> float:
        """Median over the turns."""
        return statistics.median(self.of_turns)


def interleaved(sides: Mapping[str, Side], *, turns: int = TURNS, turn_s: float = TURN_S) -> dict[str, Rates]:
    """Run each side once to warm up, then all sides in turns, so that a noisy neighbour affects each of them.

    Args:
        sides: the sides to measure, by name.
        turns: turns of each side; each begins with another side, since the first one meets the caches of the last.
        turn_s: the least seconds of work in a turn.
    """
    for work in sides.values():
        work()
    works: dict[str, list[list[Work]]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            works[name].append(_turn(sides[name], turn_s))
    return {name: _rates(of_turns) for name, of_turns in works.items()}


def _turn(side: Side, turn_s: float) -> list[Work]:
    works = [side()]
    while sum(work.seconds for work in works) < turn_s:
        works.append(side())
    return works


def _rates(turns: Sequence[Sequence[Work]]) -> Rates:
    seconds = [sum(work.seconds for work in works) for works in turns]
    amounts = [sum(work.amount for work in works) for works in turns]
    return Rates(tuple(a / s for a, s in zip(amounts, seconds, strict=True)), sum(seconds))


@dataclass(frozen=True)
class Against:
    """The speed that ours is compared with."""

    name: str
    rates: Rates
    target: float
    """Lowest ratio of our speed to this one."""
    is_limit: bool = False
    """Whether nothing of the kind can be faster: the bare forward, a copy of memory, plain sockets."""


@dataclass(frozen=True)
class Speed:
    """A speed, its limit and its peers."""

    name: str
    unit: str
    ours: Rates
    against: tuple[Against, ...]
    per_unit: float = 1.0
    """Number of amounts in one unit."""

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of a table, one row per comparison."""
        return [self._row(other) for other in self.against]

    def _row(self, other: Against) -> tuple[str, ...]:
        ratio = self.ours.median / other.rates.median
        ratios = [a / b for a, b in zip(self.ours.of_turns, other.rates.of_turns, strict=True)]
        return (
            self.name,
            f"{self.ours.median / self.per_unit:,.4g} {self.unit}",
            f"{'limit' if other.is_limit else 'peer'}: {other.name}",
            f"{other.rates.median / self.per_unit:,.4g} {self.unit}",
            f"{ratio:.3g} ({min(ratios):.3g} to {max(ratios):.3g})",
            f">= {other.target:g}",
            _verdict(is_met=ratio >= other.target),
        )

    @property
    def seconds(self) -> float:
        """Seconds of the side that ran for the shortest time."""
        return min(self.ours.seconds, *(other.rates.seconds for other in self.against))


@dataclass(frozen=True)
class Figure:
    """A figure with its own bound: a latency, or memory."""

    name: str
    value: float
    unit: str
    target: float
    is_least: bool = False
    """Whether the target is the lowest allowed value rather than the highest."""

    def row(self) -> tuple[str, ...]:
        """Cells of a row in a table."""
        is_met = self.value >= self.target if self.is_least else self.value <= self.target
        return (
            self.name,
            f"{self.value:,.3g} {self.unit}",
            f"{'>=' if self.is_least else '<='} {self.target:g}",
            _verdict(is_met=is_met),
        )


Result = Speed | Figure


def _verdict(*, is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def tables(results: Sequence[Result]) -> str:
    """Tables of speeds, then of figures, as Markdown."""
    speeds = [result for result in results if isinstance(result, Speed)]
    figures = [result for result in results if isinstance(result, Figure)]
    parts = []
    if speeds:
        shortest = min(speed.seconds for speed in speeds)
        parts.append(table(_SPEED_HEAD, [row for speed in speeds for row in speed.rows()]))
        parts.append(f"Every side ran for {shortest:.1f} s or more.\n")
    if figures:
        parts.append(table(_FIGURE_HEAD, [figure.row() for figure in figures]))
    return "\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"

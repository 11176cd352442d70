"""RESULTS.md: notes, and a section for each machine that the benchmarks were run on."""

import datetime
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from tests.benchmarks import machine
from tests.benchmarks.measure import TURN_S, TURNS, Result, table, tables

_PATH: Final = Path(__file__).parent / "RESULTS.md"
_NOTES: Final = Path(__file__).parent / "NOTES.md"
_PACKAGES: Final = (
    "actstore",
    "torch",
    "transformers",
    "ray",
    "zarr",
    "transformer-lens",
    "sae-lens",
    "numpy",
)
_HEAD: Final = f"""# Benchmarks

Each side of a ratio runs once to warm up, and then in {TURNS} turns of {TURN_S:g} s or more beside the other sides.
Figures are medians of the turns, and the lowest and highest ratio of a turn stand beside each ratio.
A limit is what nothing of the kind can beat, such as the bare forward or a copy of memory; a peer is what else does
the same. Absolute figures drift with the machine, so ratios are what counts. `make bench` makes a section anew, and
`make bench ROWS=loader` the rows of a benchmark.
"""


def section(results: Sequence[Result], folder: Path) -> str:
    """The section with the results of this machine.

    Args:
        results: the results of all benchmarks.
        folder: a folder on the disk that they wrote to.
    """
    versions = ", ".join(f"{package} {_version(package)}" for package in _PACKAGES)
    return (
        f"## {machine.name()}\n\n{datetime.date.today()}, Python {platform.python_version()}, {versions}.\n\n"
        f"{machine.rates(folder)}\n\n{tables(results)}"
    )


def write(own: str) -> None:
    """Replace the section of the same machine, and put it first."""
    title = own.splitlines()[0]
    kept = [text for text in _sections() if text.splitlines()[0] not in (title, "## Notes")]
    notes = _NOTES.read_text(encoding="utf-8")
    _PATH.write_text("\n".join([_HEAD, own, *kept, notes]), encoding="utf-8")


def write_rows(new: str, names: Sequence[str]) -> bool:
    """Replace rows in the section of this machine; True if there is one.

    Args:
        new: tables as `tables` makes them. Their rows take the places of those of the same benchmark.
        names: the benchmarks that were run, for the date.
    """
    title = f"## {machine.name()}"
    own = next((text for text in _sections() if text.splitlines()[0] == title), None)
    if own is None:
        return False
    write(with_rows(own, new, names, datetime.date.today()))
    return True


def with_rows(section: str, new: str, names: Sequence[str], day: datetime.date) -> str:
    """A section with the rows of other tables in the places of those of the same benchmark, or at the end."""
    parts = section.split("\n\n")
    for table_of_new in (part for part in new.split("\n\n") if part.startswith("|")):
        head, *rows = _cells(table_of_new)
        i = next(i for i, part in enumerate(parts) if part.startswith("|") and _cells(part)[0] == head)
        measured = {row[0] for row in rows}
        kept = _cells(parts[i])[1:]
        first = next((place for place, row in enumerate(kept) if row[0] in measured), len(kept))
        before = [row for row in kept[:first] if row[0] not in measured]
        after = [row for row in kept[first:] if row[0] not in measured]
        parts[i] = table(head, [*before, *rows, *after]).rstrip("\n")
    line = parts[1]
    date, _, packages = line.partition(", Python")
    days = dict(item.split(": ") for item in re.findall(r"[\w ]+: [\d-]+", date))
    days |= {name: str(day) for name in names}
    listed = ", ".join(f"{name.strip()}: {at}" for name, at in days.items())
    parts[1] = f"{date[:10]} ({listed}), Python{packages}"
    return "\n\n".join(parts).rstrip("\n") + "\n"


def _cells(table_text: str) -> list[list[str]]:
    lines = table_text.strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in [lines[0], *lines[2:]]]


def _sections() -> list[str]:
    if not _PATH.exists():
        return []
    return [f"## {text.strip()}\n" for text in _PATH.read_text(encoding="utf-8").split("\n## ")[1:]]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""RESULTS.md: notes, and a section for each machine that the benchmarks were run on."""

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from tests.benchmarks import machine
from tests.benchmarks.measure import TURN_S, TURNS, Result, tables

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
the same. Absolute figures drift with the machine, so ratios are what counts. `make bench` makes a section anew.
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


def _sections() -> list[str]:
    if not _PATH.exists():
        return []
    return [f"## {text.strip()}\n" for text in _PATH.read_text(encoding="utf-8").split("\n## ")[1:]]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""The response times of the command line."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.measure import Figure, Result


def _seconds(*args: str) -> float:
    command = [str(Path(sys.executable).parent / "actstore"), *args]
    times = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def run(store: Path) -> list[Result]:
    """Median times of whole processes."""
    return [
        Figure("actstore --help", _seconds("--help"), "s", 0.4),
        Figure("actstore info, local store", _seconds("info", str(store)), "s", 1),
    ]

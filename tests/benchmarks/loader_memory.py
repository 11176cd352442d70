"""The memory of a loader without the page cache, measured in a separate process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import actstore
from tests.benchmarks.loader_store import BATCH, HOOK


def peak_mb(url: str, **options: Any) -> float:
    """MB during two epochs, above the process's memory before the loader was made."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_mb, url, options).result()


def _peak_mb(url: str, options: dict[str, Any]) -> float:
    store = actstore.open(url)
    next(
        store.loader(HOOK, batch_size=1, shuffle="window", window_rows=1, prefetch=0)
    )  # what is imported for it
    before = peak = _anonymous_mb()
    with store.loader(HOOK, batch_size=BATCH, epochs=2, **options) as loader:
        for _ in loader:
            peak = max(peak, _anonymous_mb())
    return peak - before


def _anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6

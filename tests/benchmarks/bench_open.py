"""Opening a sealed store of 10,000 segments, written without a model."""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import actstore
from actstore.storage.opening import open_blobs
from actstore.store.records.seal import seal
from tests.benchmarks.measure import Figure, Result
from tests.store.example import HOOKS, SEGMENT, example_plan, write_store

N_SEGMENTS = 10_000
_MEMORY = Path("/dev/shm")
"""A folder in memory for 50,000 small files: writing them is not measured."""


def run(*, repeats: int = 9) -> list[Result]:
    """Measure the medians of opening it, and of opening it and reading one row; the page cache is warm."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        blobs = open_blobs(folder)
        plan = example_plan(n_sequences=N_SEGMENTS * SEGMENT, n_tokens=N_SEGMENTS * SEGMENT * 8)
        hook = plan.request.hooks[0]
        plan = plan.model_copy(update={"request": plan.request.model_copy(update={"hooks": (hook,)})})
        layout = plan.activations(hook)
        values = {hook.name: np.zeros(layout.shape, "<f4")}
        write_store(blobs, plan, values, range(plan.n_segments))
        seal(blobs)
        opened, read = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            store = actstore.open(folder)
            assert store.is_complete
            opened.append(time.perf_counter() - started)
            store[HOOKS[0]].numpy(-1)
            read.append(time.perf_counter() - started)
    return [
        Figure(f"open a sealed store of {N_SEGMENTS:,} segments", 1e3 * statistics.median(opened), "ms", 100),
        Figure("open it and read its last row", 1e3 * statistics.median(read), "ms", 100),
    ]

"""Windows from S3 (SeaweedFS), compared with ranged GETs of the same client at the same concurrency."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import actstore
from actstore.loader.rows.window_rows import N_REQUESTS
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.layout import ArrayLayout
from actstore.store.reading.sections import PIECE_NBYTES
from tests.benchmarks.bench_s3 import server
from tests.benchmarks.loader_memory import peak_mb
from tests.benchmarks.loader_store import BATCH, D_MODEL, HOOK, LENGTH, N_SEQUENCES, SEGMENT, plan_of
from tests.benchmarks.measure import Against, Figure, Result, Speed, Work, interleaved
from tests.store.example import write_store

WINDOW_ROWS = 32_768
"""A quarter of the rows of the store."""


def _raw(blobs: Blobs, layout: ArrayLayout) -> Work:
    """The bytes of all shards, read in pieces into reused memory."""
    nbytes = layout.data_nbytes(0)
    out = np.empty((layout.n_shards, nbytes), np.uint8)
    out[:] = 0
    pieces = [(shard, start) for shard in range(layout.n_shards) for start in range(0, nbytes, PIECE_NBYTES)]

    def get(piece: tuple[int, int]) -> None:
        shard, start = piece
        blobs.read_into(layout.key(shard), start, out[shard, start : start + PIECE_NBYTES])

    with ThreadPoolExecutor(N_REQUESTS) as threads:
        started = time.perf_counter()
        list(threads.map(get, pieces))
        return Work(out.nbytes, time.perf_counter() - started)


def _loaded(url: str, cache_dir: Path | None = None) -> Work:
    """The bytes of two epochs after a first one: memory is reused, and as much is read ahead as at the end."""
    loader = actstore.open(url).loader(
        HOOK, batch_size=BATCH, shuffle="window", window_rows=WINDOW_ROWS, epochs=None, cache_dir=cache_dir
    )
    with loader:
        for _ in range(loader.n_batches):
            next(loader)
        started = time.perf_counter()
        nbytes: int = sum(next(loader).nbytes for _ in range(2 * loader.n_batches))
        return Work(nbytes, time.perf_counter() - started)


def _memory(url: str, client: str) -> Figure:
    """The memory of two windows and four batches: two that are ready, one at either end."""
    nbytes = (2 * WINDOW_ROWS + 4 * SEGMENT * LENGTH + 4 * BATCH) * 2 * D_MODEL
    peak = peak_mb(url, shuffle="window", window_rows=WINDOW_ROWS)
    name = f"loader, S3 ({client}), windows of {WINDOW_ROWS:,} rows: memory"
    return Figure(name, peak, "MB", round(nbytes / 1e6))


def run(folder: Path) -> list[Result]:
    """Measure all sides in turns."""
    plan = plan_of(N_SEQUENCES)
    layout = plan.activations(plan.request.hooks[0])
    values = {HOOK: torch.randn(layout.shape, dtype=torch.bfloat16).view(torch.uint16).numpy()}
    results: list[Result] = []
    with server() as started, pytest.MonkeyPatch.context() as environment:
        for client in ("obstore", "s3fs"):
            environment.setenv("ACTSTORE_S3", client)
            blobs = open_blobs(f"s3://{started.bucket}/{client}")
            write_store(blobs, plan, values, range(plan.n_segments))
            rates = interleaved({"ours": partial(_loaded, blobs.url), "raw": partial(_raw, blobs, layout)})
            name = f"loader, S3 (SeaweedFS, {client}), windows of {WINDOW_ROWS:,} rows"
            gets = Against(f"{N_REQUESTS} GETs at once, of the same client", rates["raw"], 0.9, is_limit=True)
            results += [Speed(name, "MB/s", rates["ours"], (gets,), 1e6), _memory(blobs.url, client)]
        local = LocalBlobs(folder / "windows")
        write_store(local, plan, values, range(plan.n_segments))
        rates = interleaved(
            {"cached": partial(_loaded, blobs.url, folder / "shards"), "local": partial(_loaded, local.url)}
        )
        limit = Against("the same store on the local disk", rates["local"], 0.9, is_limit=True)
        results.append(
            Speed("loader, S3, second epoch with cache_dir", "GB/s", rates["cached"], (limit,), 1e9)
        )
    for used in ("windows", "shards"):
        shutil.rmtree(folder / used)
    return results

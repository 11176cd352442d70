"""Windows from S3, through SeaweedFS: against ranged GETs of the same client at the same concurrency."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

import actstore
from actstore.loader.window_rows import N_REQUESTS
from actstore.store.blobs import Blobs, open_blobs
from actstore.store.layout import ArrayLayout
from actstore.store.local import LocalBlobs
from actstore.store.sections import PIECE_NBYTES
from tests.benchmarks.bench_s3 import server
from tests.benchmarks.loader_memory import peak_mb
from tests.benchmarks.loader_store import BATCH, D_MODEL, HOOK, LENGTH, N_SEQUENCES, SEGMENT, plan_of
from tests.benchmarks.measure import Ratio, in_turns
from tests.store.example import write_store

WINDOW_ROWS = 32_768
"""A quarter of the store."""


def _raw(blobs: Blobs, layout: ArrayLayout) -> float:
    """Bytes a second of all shards in pieces, into memory that is there."""
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
        return out.nbytes / (time.perf_counter() - started)


def _rate(url: str, cache_dir: Path | None = None) -> float:
    """Bytes a second of two epochs, after another one: memory is there, and as much is read ahead as at the end."""
    loader = actstore.open(url).loader(
        HOOK, batch_size=BATCH, shuffle="window", window_rows=WINDOW_ROWS, epochs=None, cache_dir=cache_dir
    )
    with loader:
        for _ in range(loader.n_batches):
            next(loader)
        started = time.perf_counter()
        nbytes: int = sum(next(loader).nbytes for _ in range(2 * loader.n_batches))
        return nbytes / (time.perf_counter() - started)


def _memory(url: str, client: str) -> Ratio:
    """Two windows, and batches: two that are ready, one at either end."""
    nbytes = (2 * WINDOW_ROWS + 4 * SEGMENT * LENGTH + 4 * BATCH) * 2 * D_MODEL
    peak = peak_mb(url, shuffle="window", window_rows=WINDOW_ROWS)
    name = f"loader, S3 ({client}), windows of {WINDOW_ROWS:,} rows: memory"
    return Ratio(name, peak, 0, "MB", round(nbytes / 1e6), "", lower_is_better=True)


def run(folder: Path, *, repeats: int = 5) -> list[Ratio]:
    """In turns."""
    plan = plan_of(N_SEQUENCES)
    layout = plan.activations(plan.request.hooks[0])
    values = {HOOK: torch.randn(layout.shape, dtype=torch.bfloat16).view(torch.uint16).numpy()}
    ratios = []
    with server() as started:
        for client in ("obstore", "s3fs"):
            os.environ["ACTSTORE_S3"] = client
            blobs = open_blobs(f"s3://{started.bucket}/{client}")
            write_store(blobs, plan, values, range(plan.n_segments))
            ours, raw = in_turns(partial(_rate, blobs.url), partial(_raw, blobs, layout), repeats=repeats)
            name = f"loader, S3 (SeaweedFS, {client}), windows of {WINDOW_ROWS:,} rows"
            ratios.append(Ratio(name, ours / 1e6, raw / 1e6, "MB/s", 0.9, f"{N_REQUESTS} GETs at once"))
            ratios.append(_memory(blobs.url, client))
        local = LocalBlobs(folder / "windows")
        write_store(local, plan, values, range(plan.n_segments))
        cached, plain = in_turns(
            partial(_rate, blobs.url, folder / "shards"), partial(_rate, local.url), repeats=repeats
        )
        name = "loader, S3, second epoch with cache_dir"
        ratios.append(Ratio(name, cached / 1e9, plain / 1e9, "GB/s", 0.9, "the same store on the local disk"))
        del os.environ["ACTSTORE_S3"]
    for used in ("windows", "shards"):
        shutil.rmtree(folder / used)
    return ratios

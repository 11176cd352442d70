"""Windows from S3, through SeaweedFS: against ranged GETs of the same client at the same concurrency."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import actstore
from actstore.loader.window_rows import N_REQUESTS
from actstore.store.blobs import Blobs, open_blobs
from actstore.store.layout import ArrayLayout
from actstore.store.sections import PIECE_NBYTES
from tests.benchmarks.bench_s3 import server
from tests.benchmarks.loader_store import BATCH, D_MODEL, HOOK, N_SEQUENCES, plan_of
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


def _ours(url: str, row_nbytes: int) -> float:
    """Bytes a second of two epochs, the first window included."""
    store = actstore.open(url)
    with store.loader(HOOK, batch_size=BATCH, shuffle="window", window_rows=WINDOW_ROWS, epochs=2) as loader:
        started = time.perf_counter()
        n_rows = sum(len(batch) for batch in loader)
        return n_rows * row_nbytes / (time.perf_counter() - started)


def run(*, repeats: int = 5) -> list[Ratio]:
    """In turns."""
    plan = plan_of(N_SEQUENCES)
    layout = plan.activations(plan.request.hooks[0])
    values = torch.randn(layout.shape, dtype=torch.bfloat16)
    ratios = []
    with server() as started:
        for client in ("obstore", "s3fs"):
            os.environ["ACTSTORE_S3"] = client
            blobs = open_blobs(f"s3://{started.bucket}/{client}")
            write_store(blobs, plan, {HOOK: values.view(torch.uint16).numpy()}, range(plan.n_segments))
            ours, raw = in_turns(
                lambda url=blobs.url: _ours(url, 2 * D_MODEL),  # type: ignore[misc]
                lambda blobs=blobs: _raw(blobs, layout),  # type: ignore[misc]
                repeats=repeats,
            )
            name = f"loader, S3 (SeaweedFS, {client}), windows of {WINDOW_ROWS:,} rows"
            ratios.append(Ratio(name, ours / 1e6, raw / 1e6, "MB/s", 0.9, f"{N_REQUESTS} GETs at once"))
        del os.environ["ACTSTORE_S3"]
    return ratios

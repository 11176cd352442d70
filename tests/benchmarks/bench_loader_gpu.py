"""Shuffled batches on a GPU, compared with copies of one batch from pinned memory, the most that the bus allows."""

import itertools
import time
from pathlib import Path

import torch

import actstore
from tests.benchmarks.loader_store import BATCH, D_MODEL, HOOK, N_ROWS, store_at
from tests.benchmarks.measure import Against, Result, Speed, Work, interleaved

_N_BATCHES = 4 * N_ROWS // BATCH


def _ours(url: Path) -> Work:
    """The bytes of batches on the GPU, without the first epoch."""
    with actstore.open(str(url)).loader(HOOK, batch_size=BATCH, epochs=None, device="cuda") as loader:
        for _ in itertools.islice(loader, N_ROWS // BATCH):
            pass
        torch.cuda.synchronize()
        started = time.perf_counter()
        nbytes: int = sum(batch.nbytes for batch in itertools.islice(loader, _N_BATCHES))
        torch.cuda.synchronize()
        return Work(nbytes, time.perf_counter() - started)


def _bus() -> Work:
    here = torch.empty(BATCH, D_MODEL, dtype=torch.bfloat16, pin_memory=True)
    there = torch.empty_like(here, device="cuda")
    there.copy_(here, non_blocking=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_N_BATCHES):
        there.copy_(here, non_blocking=True)
    torch.cuda.synchronize()
    return Work(_N_BATCHES * here.nbytes, time.perf_counter() - started)


def run(folder: Path) -> list[Result]:
    """Measure in turns; all files are in the page cache."""
    url = folder / "loader"
    store_at(url)
    rates = interleaved({"ours": lambda: _ours(url), "bus": _bus})
    bus = Against("copies from pinned memory alone", rates["bus"], 0.5, is_limit=True)
    name = f"loader to the GPU, d={D_MODEL} bf16, batch {BATCH}, global shuffle"
    return [Speed(name, "GB/s", rates["ours"], (bus,), 1e9)]

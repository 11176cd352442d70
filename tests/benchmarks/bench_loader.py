"""Shuffled batches of a local store, compared with `torch.index_select` in memory and with SAELens' cached store."""

import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from sae_lens.training.activations_store import ActivationsStore

import actstore
from tests.benchmarks.loader_memory import peak_mb
from tests.benchmarks.loader_store import BATCH, D_MODEL, HOOK, LENGTH, N_ROWS, store_at
from tests.benchmarks.measure import Against, Figure, Result, Speed, Work, interleaved

_N_BATCHES = N_ROWS // BATCH
_BLOCK = 256
"""Rows that are gathered before they are converted."""
_MIXED_BATCHES = 64
"""Contexts in SAELens' buffer: twice a training batch."""


def _saelens_cache(folder: Path, values: torch.Tensor) -> None:
    features = datasets.Features({HOOK: datasets.Array2D((LENGTH, D_MODEL), "float32")})
    rows = values.float().view(-1, LENGTH, D_MODEL).numpy()
    datasets.Dataset.from_dict({HOOK: rows}, features=features).save_to_disk(str(folder))


def _saelens_batches(folder: Path) -> Iterator[torch.Tensor]:
    store = ActivationsStore(
        model=SimpleNamespace(tokenizer=None),  # not used
        dataset=datasets.Dataset.from_dict({"tokens": [[0] * LENGTH]}),
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=LENGTH,
        d_in=D_MODEL,
        n_batches_in_buffer=_MIXED_BATCHES,
        total_training_tokens=N_ROWS,
        store_batch_size_prompts=8,
        train_batch_size_tokens=BATCH,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(folder),
    )
    return iter(store.get_data_loader())


def _rows(batches: Iterator[torch.Tensor], n_batches: int) -> Work:
    """The rows of batches, without the first batch."""
    next(batches)
    started = time.perf_counter()
    n_rows = sum(len(batch) for batch in itertools.islice(batches, n_batches))
    return Work(n_rows, time.perf_counter() - started)


def _ours(url: Path, dtype: str | None = None) -> Work:
    with actstore.open(str(url)).loader(HOOK, batch_size=BATCH, dtype=dtype, epochs=None, seed=1) as loader:
        for _ in range(_N_BATCHES):  # afterwards every page is in the process's page tables
            next(loader)
        return _rows(loader, 4 * _N_BATCHES)


class _InMemory:
    """Batches of an array in memory in random order, the fastest that any loader could be."""

    def __init__(self, values: torch.Tensor) -> None:
        order = torch.randperm(N_ROWS)
        self._chosen = [order[start : start + BATCH] for start in range(0, N_ROWS, BATCH)]
        self._values = values

    def as_stored(self) -> Work:
        """Gather with `torch.index_select`, in words of 64 bits."""
        memory = self._values.view(torch.int64)
        out = torch.empty(BATCH, D_MODEL // 4, dtype=torch.int64)
        return self._rows(lambda chosen: torch.index_select(memory, 0, chosen, out=out))

    def as_float32(self) -> Work:
        """Gather and convert in blocks that stay in the processor's caches in between."""
        memory = self._values.view(torch.int64)
        block = torch.empty(_BLOCK, D_MODEL // 4, dtype=torch.int64)
        out = torch.empty(BATCH, D_MODEL)

        def fill(chosen: torch.Tensor) -> None:
            for start in range(0, BATCH, _BLOCK):
                torch.index_select(memory, 0, chosen[start : start + _BLOCK], out=block)
                out[start : start + _BLOCK] = block.view(torch.bfloat16)

        return self._rows(fill)

    def _rows(self, fill: Callable[[torch.Tensor], object]) -> Work:
        started = time.perf_counter()
        for _ in range(4):
            for chosen in self._chosen:
                fill(chosen)
        return Work(4 * N_ROWS, time.perf_counter() - started)


def _first_ms(url: Path, state: dict[str, Any] | None = None) -> float:
    store = actstore.open(str(url))
    started = time.perf_counter()
    with store.loader(HOOK, batch_size=BATCH, epochs=None, seed=1) as loader:
        if state is not None:
            loader.load_state_dict(loader.state_dict() | state)
        next(loader)
        return 1e3 * (time.perf_counter() - started)


def run(folder: Path, *, repeats: int = 7) -> list[Result]:
    """Measure all sides in turns; all files are in the page cache."""
    url, cache = folder / "loader", folder / "saelens-cache"
    values = store_at(url)
    _saelens_cache(cache, values)
    memory = _InMemory(values)
    rates = interleaved(
        {
            "stored": lambda: _ours(url),
            "float32": lambda: _ours(url, "float32"),
            "memory": memory.as_stored,
            "widened": memory.as_float32,
            "saelens": lambda: _rows(_saelens_batches(cache), _N_BATCHES // 2),
        }
    )
    first = statistics.median(_first_ms(url) for _ in range(repeats))
    epoch, k = divmod(1_000_000, _N_BATCHES)
    late = statistics.median(_first_ms(url, {"epoch": epoch, "batch": k}) for _ in range(repeats))
    held = peak_mb(str(url))
    shutil.rmtree(url)
    shutil.rmtree(cache)
    name = f"loader, d={D_MODEL} bf16, batch {BATCH}, global shuffle"
    row_nbytes = D_MODEL * values.element_size()
    gather = Against("torch.index_select over memory", rates["memory"], 0.8, is_limit=True)
    widen = Against("gather and widening over memory, blocked", rates["widened"], 0.8, is_limit=True)
    saelens = Against("SAELens cached ActivationsStore", rates["saelens"], 5)
    return [
        Speed(name, "GB/s", rates["stored"], (gather,), per_unit=1e9 / row_nbytes),
        Speed(f"{name}, as float32", "rows/s", rates["float32"], (widen, saelens)),
        Figure("loader: first batch", first, "ms", 100),
        Figure("loader: first batch when resumed at batch 1,000,000", late, "ms", 100),
        # Two batches that are ready, and one at either end; mapped files belong to the page cache.
        Figure("loader: memory", held, "MB", round(4 * BATCH * row_nbytes / 1e6) + 1),
    ]

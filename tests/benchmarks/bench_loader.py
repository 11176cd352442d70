"""Shuffled batches from a local store: against `torch.index_select` over memory, and against SAELens' cached store."""

import itertools
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from sae_lens.training.activations_store import ActivationsStore

import actstore
from tests.benchmarks.loader_memory import peak_mb
from tests.benchmarks.loader_store import BATCH, D_MODEL, HOOK, LENGTH, N_ROWS, store_at
from tests.benchmarks.measure import Ratio, all_in_turns

_N_BATCHES = N_ROWS // BATCH
_MIXED_BATCHES = 64
"""Of SAELens' buffer, in contexts: twice a batch of training."""


def _saelens_cache(folder: Path, values: torch.Tensor) -> None:
    features = datasets.Features({HOOK: datasets.Array2D((LENGTH, D_MODEL), "float32")})
    rows = values.float().view(-1, LENGTH, D_MODEL).numpy()
    datasets.Dataset.from_dict({HOOK: rows}, features=features).save_to_disk(str(folder))


def _saelens_batches(folder: Path) -> Iterator[torch.Tensor]:
    store = ActivationsStore(
        model=SimpleNamespace(tokenizer=None),  # it is not used
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


def _rate(batches: Iterator[Any], n_batches: int) -> float:
    """Rows a second, the first batch not counted."""
    next(batches)
    started = time.perf_counter()
    n_rows = sum(len(batch) for batch in itertools.islice(batches, n_batches))
    return n_rows / (time.perf_counter() - started)


def _ours(url: Path, n_batches: int, dtype: str | None = None) -> float:
    with actstore.open(str(url)).loader(HOOK, batch_size=BATCH, dtype=dtype, epochs=None, seed=1) as loader:
        for _ in range(_N_BATCHES):  # every page is in the tables of the process then
            next(loader)
        return _rate(loader, n_batches)


def _in_memory(values: torch.Tensor, n_batches: int) -> float:
    memory, out = values.view(torch.int64), torch.empty(BATCH, D_MODEL // 4, dtype=torch.int64)
    order = torch.randperm(N_ROWS)
    rows = [order[start : start + BATCH] for start in range(0, N_ROWS, BATCH)]

    def batches() -> Iterator[torch.Tensor]:
        for chosen in itertools.cycle(rows):
            torch.index_select(memory, 0, chosen, out=out)
            yield out

    return _rate(batches(), n_batches)


def _first_ms(url: Path, state: dict[str, Any] | None = None) -> float:
    store = actstore.open(str(url))
    started = time.perf_counter()
    with store.loader(HOOK, batch_size=BATCH, epochs=None, seed=1) as loader:
        if state is not None:
            loader.load_state_dict(loader.state_dict() | state)
        next(loader)
        return 1e3 * (time.perf_counter() - started)


def run(folder: Path, *, repeats: int = 7) -> list[Ratio]:
    """All in turns; all files are in the page cache."""
    url, cache = folder / "loader", folder / "saelens-cache"
    values = store_at(url)
    _saelens_cache(cache, values)
    rates = all_in_turns(
        {
            "stored": lambda: _ours(url, 4 * _N_BATCHES),
            "float32": lambda: _ours(url, 4 * _N_BATCHES, "float32"),
            "memory": lambda: _in_memory(values, 4 * _N_BATCHES),
            "saelens": lambda: _rate(_saelens_batches(cache), _N_BATCHES // 2),
        },
        repeats=repeats,
    )
    row_nbytes = D_MODEL * values.element_size()
    first = statistics.median(_first_ms(url) for _ in range(repeats))
    epoch, k = divmod(1_000_000, _N_BATCHES)
    late = statistics.median(_first_ms(url, {"epoch": epoch, "batch": k}) for _ in range(repeats))
    memory = peak_mb(str(url))
    shutil.rmtree(url)
    shutil.rmtree(cache)
    name = f"loader, d={D_MODEL} bf16, batch {BATCH}, global shuffle"
    gb = row_nbytes / 1e9
    return [
        Ratio(
            name, rates["stored"] * gb, rates["memory"] * gb, "GB/s", 0.8, "torch.index_select over memory"
        ),
        Ratio(
            f"{name}, as float32",
            rates["float32"],
            rates["saelens"],
            "rows/s",
            20,
            "SAELens cached ActivationsStore",
        ),
        Ratio("loader: first batch", first, first, "ms", 100, "-", lower_is_better=True),
        Ratio(
            "loader: first batch when resumed at batch 1,000,000",
            late,
            late,
            "ms",
            100,
            "-",
            lower_is_better=True,
        ),
        # Two that are ready, and one at either end; files are the page cache's.
        Ratio(
            "loader: memory",
            memory,
            0,
            "MB",
            round(4 * BATCH * row_nbytes / 1e6) + 1,
            "",
            lower_is_better=True,
        ),
    ]

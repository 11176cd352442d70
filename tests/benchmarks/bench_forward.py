"""Extraction of a real model, in this process and by a Ray worker, compared with the bare forward: the cost of hooking,
statistics, copying, writing and distributing during a run, and the time that it takes to start and to end.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import actstore
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT
from actstore.extraction.events import Event, SegmentDone
from tests.benchmarks.measure import TURNS, Against, Figure, Result, Speed, Work, interleaved, timed

HOOK: Final = "blocks.15.hook_resid_post"
_N_LAYERS: Final = 16
BATCH: Final = 8
CONTEXT: Final = 128
_STEP: Final = BATCH * CONTEXT
_RUN_S: Final = 8.0
"""Approximate seconds of each side in a turn."""
_N_FIRST: Final = SEGMENTS_IN_FLIGHT
"""Segments at the start of a run that are not measured, of 16 or more: memory is new, and a row of the very first
segment is computed again by the whole model.
"""
_NAME: Final = f"SmolLM2-135M bf16, {BATCH}x{CONTEXT}, one hook at layer 15"


def _bare(model: Path) -> Callable[[], float]:
    """The forward of a batch by the unmodified Hugging Face model, cut after the hooked layer; returns its tokens."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = _N_LAYERS
    base = AutoModel.from_pretrained(model, config=config, dtype=torch.bfloat16).eval()
    tokens = torch.randint(0, config.vocab_size, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))

    def forward() -> float:
        with torch.inference_mode():
            base(input_ids=tokens, use_cache=False)
        return _STEP

    return forward


def _tokens(folder: Path, model: Path, n_tokens: int) -> Path:
    from transformers import AutoConfig

    n_ids = AutoConfig.from_pretrained(model).vocab_size
    ids = np.random.default_rng(0).integers(2, n_ids, (n_tokens // CONTEXT, CONTEXT))
    path = folder / "forward.parquet"
    pq.write_table(pa.table({"input_ids": ids.tolist()}), path)
    return path


@dataclass
class _Seconds:
    """Seconds of the parts of each run of one executor."""

    to_first: list[float] = field(default_factory=list)
    """From the call to the first commit."""
    end: list[float] = field(default_factory=list)
    """From the last commit to the report."""


def _extracted(job: dict[str, Any], out: Path, executor: str, seconds: _Seconds) -> Work:
    """Run one extraction, and measure it from the commit of the `_N_FIRST`-th segment to the last."""
    shutil.rmtree(out, ignore_errors=True)
    commits: list[tuple[float, int]] = []

    def note(event: Event) -> None:
        assert isinstance(event, SegmentDone)
        commits.append((time.perf_counter(), event.n_sequences * CONTEXT))

    planned = actstore.plan(**job, out=str(out))
    started = time.perf_counter()
    actstore.extract(planned, executor=executor, num_workers=1, on_event=note)
    ended = time.perf_counter()
    times = [time_of for time_of, _ in commits]
    seconds.to_first.append(times[0] - started)
    seconds.end.append(ended - times[-1])
    return Work(sum(n_tokens for _, n_tokens in commits[_N_FIRST:]), times[-1] - times[_N_FIRST - 1])


def run(model: Path, folder: Path) -> list[Result]:
    """Measure all sides in turns, with statistics of every value, as by default."""
    # In a separate thread, like that of an extraction. torch has a pool of threads for each calling thread, and threads
    # wait in another way if all pools together have more threads than there are cores.
    with ThreadPoolExecutor(1) as thread:
        forward = thread.submit(_bare, model).result()
        thread.submit(forward).result()
        first = thread.submit(timed(forward)).result()
    n_batches = max(16, round(_RUN_S * first.amount / first.seconds / _STEP))

    def bare() -> Work:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(forward).result()
            return thread.submit(timed(lambda: sum(forward() for _ in range(n_batches)))).result()

    job: dict[str, Any] = {
        "model": str(model),
        "tokens": str(_tokens(folder, model, n_batches * _STEP)),
        "hooks": HOOK,
        "context_length": CONTEXT,
        "batch_size": BATCH,
        "dtype": "bfloat16",
    }
    seconds = {executor: _Seconds() for executor in ("inline", "ray")}

    def extracted(executor: str) -> Work:
        return _extracted(job, folder / f"forward-{executor}", executor, seconds[executor])

    rates = interleaved(
        {"bare": bare, "inline": lambda: extracted("inline"), "ray": lambda: extracted("ray")}, turns=TURNS
    )
    bare_forward = Against("bare forward of the same 16 layers", rates["bare"], 0.97, is_limit=True)
    inline = Against("inline", rates["inline"], 0.97, is_limit=True)
    return [
        Speed(f"extraction inline, {_NAME}", "tokens/s", rates["inline"], (bare_forward,)),
        Speed(f"extraction by 1 Ray worker, {_NAME}", "tokens/s", rates["ray"], (inline,)),
        *_figures("inline", seconds["inline"], to_first=5, end=1),
        *_figures("1 Ray worker", seconds["ray"], to_first=30, end=5),
    ]


def _figures(name: str, seconds: _Seconds, *, to_first: float, end: float) -> list[Figure]:
    """The fixed costs of a run, whatever its length."""
    return [
        Figure(
            f"{name}: from `extract` to the first commit", statistics.median(seconds.to_first), "s", to_first
        ),
        Figure(f"{name}: from the last commit to the report", statistics.median(seconds.end), "s", end),
    ]

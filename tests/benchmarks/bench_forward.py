"""Extraction of a real model, in this process and by a Ray worker, against the bare forward: what hooking, statistics,
copying, writing and distributing cost.
"""

import shutil
import statistics
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import actstore
from actstore.extraction.report import Report
from tests.benchmarks.measure import TURNS, Against, Figure, Result, Side, Speed, Work, interleaved, timed

HOOK: Final = "blocks.15.hook_resid_post"
_N_LAYERS: Final = 16
BATCH: Final = 8
CONTEXT: Final = 128
_STEP: Final = BATCH * CONTEXT
_RUN_S: Final = 4.0
"""Of one extraction: its first and last segment overlap with nothing."""
_NAME: Final = f"SmolLM2-135M bf16, {BATCH}x{CONTEXT}, one hook at layer 15"


def _bare(model: Path) -> Side:
    """Tokens of the unmodified Hugging Face model, cut after the hooked layer, in batches of the same shape."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = _N_LAYERS
    base = AutoModel.from_pretrained(model, config=config, dtype=torch.bfloat16).eval()
    tokens = torch.randint(0, config.vocab_size, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))

    def forward() -> float:
        with torch.inference_mode():
            base(input_ids=tokens, use_cache=False)
        return _STEP

    return timed(forward)


def _tokens(folder: Path, model: Path, n_tokens: int) -> Path:
    from transformers import AutoConfig

    n_ids = AutoConfig.from_pretrained(model).vocab_size
    ids = np.random.default_rng(0).integers(2, n_ids, (n_tokens // CONTEXT, CONTEXT))
    path = folder / "forward.parquet"
    pq.write_table(pa.table({"input_ids": ids.tolist()}), path)
    return path


def run(model: Path, folder: Path) -> list[Result]:
    """All in turns, with statistics of every value, as by default."""
    bare = _bare(model)
    bare()
    forward = bare()
    n_tokens = max(1, round(_RUN_S * forward.amount / forward.seconds / _STEP)) * _STEP
    job: dict[str, Any] = {
        "model": str(model),
        "tokens": str(_tokens(folder, model, n_tokens)),
        "hooks": HOOK,
        "context_length": CONTEXT,
        "batch_size": BATCH,
        "dtype": "bfloat16",
    }
    starts: dict[str, list[float]] = {"inline": [], "ray": []}

    def extracted(executor: str) -> Work:
        out = folder / f"forward-{executor}"
        shutil.rmtree(out, ignore_errors=True)
        report: Report = actstore.extract(
            actstore.plan(**job, out=str(out)), executor=executor, num_workers=1
        )
        starts[executor].append(report.seconds - report.seconds_running)
        return Work(report.n_tokens_computed, report.seconds_running)

    rates = interleaved(
        {"bare": bare, "inline": lambda: extracted("inline"), "ray": lambda: extracted("ray")}, turns=TURNS
    )
    first = {executor: statistics.median(seconds) for executor, seconds in starts.items()}
    bare_forward = Against("bare forward of the same 16 layers", rates["bare"], 0.97, is_limit=True)
    inline = Against("inline", rates["inline"], 0.97, is_limit=True)
    return [
        Speed(f"extraction inline, {_NAME}", "tokens/s", rates["inline"], (bare_forward,)),
        Speed(f"extraction by 1 Ray worker, {_NAME}", "tokens/s", rates["ray"], (inline,)),
        Figure("inline: from `extract` to the first segment", first["inline"], "s", 5),
        Figure("1 Ray worker: from `extract` to the first segment", first["ray"], "s", 30),
    ]

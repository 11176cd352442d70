"""Extracting the last token of many prompts of different length, compared with a bare loop over Hugging Face, and with
all positions of prompts that are padded to the context.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import actstore
from tests.benchmarks.measure import Against, Figure, Result, Speed, Work, interleaved, timed

LAYERS: Final = (7, 15, 22, 29)
"""The last one of SmolLM2 among them, so that no side can end its forward earlier."""
CONTEXT: Final = 128
BATCH: Final = 32
_N_PROMPTS: Final = 500


def _prompts(n: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 40_000, size=int(length)).tolist() for length in rng.integers(5, 101, size=n)]


def _bare(model: Path, prompts: list[list[int]]) -> Callable[[], float]:
    """Hugging Face over batches sorted by length, padded to their longest prompt; only the vectors are kept."""
    from transformers import AutoModel

    base = AutoModel.from_pretrained(model, dtype=torch.bfloat16).eval()
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)

    def loop() -> float:
        kept = torch.empty(len(prompts), len(LAYERS), base.config.hidden_size, dtype=torch.bfloat16)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            ids = torch.zeros(len(rows), len(prompts[rows[0]]), dtype=torch.int64)
            for place, row in enumerate(rows):
                ids[place, : len(prompts[row])] = torch.tensor(prompts[row])
            last = torch.tensor([len(prompts[row]) - 1 for row in rows])
            with torch.inference_mode():
                states = base(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
            for number, layer in enumerate(LAYERS):
                kept[rows, number] = states[layer + 1][torch.arange(len(rows)), last]
        return len(prompts)

    return loop


def run(model: Path, folder: Path, n_prompts: int = _N_PROMPTS) -> list[Result]:
    """Measure all sides in turns, from the first forward to the last commit."""
    prompts = _prompts(n_prompts)
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in prompts))
    job: dict[str, Any] = {
        "model": str(model),
        "tokens": str(source),
        "hooks": [f"blocks.{layer}.hook_resid_post" for layer in LAYERS],
        "packing": "document",
        "context_length": CONTEXT,
        "batch_size": BATCH,
        "dtype": "bfloat16",
    }

    def extracted(name: str, *, is_sorted: bool, **fields: Any) -> Work:
        out = folder / f"prompts-{name}"
        shutil.rmtree(out, ignore_errors=True)
        planned = actstore.plan(**job, **fields, out=str(out))
        if not is_sorted:
            request = planned.plan.request.model_copy(update={"batching": None})
            planned = replace(planned, plan=planned.plan.model_copy(update={"request": request}))
        return Work(n_prompts, actstore.extract(planned).seconds_running)

    # In a separate thread, like that of an extraction; see `tests.benchmarks.bench_forward`.
    with ThreadPoolExecutor(1) as thread:
        loop = thread.submit(_bare, model, prompts).result()

    def bare() -> Work:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(timed(loop)).result()

    rates = interleaved(
        {
            "bare": bare,
            "last": lambda: extracted("last", is_sorted=True, positions="last"),
            "all": lambda: extracted("all", is_sorted=False),
        },
        turns=3,
    )
    stored = actstore.open(str(folder / "prompts-last"))
    acts = sum(stored[hook].nbytes for hook in stored.hooks)
    vectors = n_prompts * len(LAYERS) * 576 * 2
    return [
        Speed(
            f"extraction inline, SmolLM2-135M bf16, last token of {n_prompts:,} prompts of 5 to 100 tokens, 4 layers",
            "prompts/s",
            rates["last"],
            (
                Against("bare loop, sorted by length", rates["bare"], 0.9, is_limit=True),
                Against(f"all positions, padded to {CONTEXT}", rates["all"], 3),
            ),
        ),
        Figure("last tokens: bytes of activations over rows x d_model x itemsize", acts / vectors, "x", 1.05),
    ]

"""Inline extraction against the bare forward: what hooking, copying and writing cost."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch

import actstore
from tests.benchmarks.measure import Ratio, in_turns

HOOK = "blocks.15.hook_resid_post"
BATCH = 8
CONTEXT = 128
N_TOKENS = 2_048  # CPUs without bfloat16 arithmetic are slow


def bare_forward(model: Path, tokens: torch.Tensor) -> float:
    """Tokens/s of the unmodified Hugging Face model, cut after the hooked layer, on the same batches."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 16
    base = AutoModel.from_pretrained(model, config=config, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        base(input_ids=tokens[:BATCH], use_cache=False)
        started = time.perf_counter()
        for start in range(0, len(tokens), BATCH):
            base(input_ids=tokens[start : start + BATCH], use_cache=False)
        return tokens.numel() / (time.perf_counter() - started)


def run(model: Path, text: Path, folder: Path, *, repeats: int = 3) -> list[Ratio]:
    """Both in turns."""
    job: dict[str, Any] = {
        "model": str(model),
        "tokens": str(text),
        "hooks": HOOK,
        "context_length": CONTEXT,
        "batch_size": BATCH,
        "dtype": "bfloat16",
        "max_tokens": N_TOKENS,
    }
    reference = folder / "forward-reference"
    actstore.extract(actstore.plan(**job, out=str(reference)))
    tokens = torch.from_numpy(actstore.open(str(reference)).tokens[:]).long()

    def ours() -> float:
        out = folder / "forward"
        shutil.rmtree(out, ignore_errors=True)
        return actstore.extract(actstore.plan(**job, out=str(out))).tokens_per_second

    a, b = in_turns(ours, lambda: bare_forward(model, tokens), repeats=repeats)
    name = "inline, SmolLM2-135M bf16, one hook at layer 15"
    return [Ratio(name, a, b, "tokens/s", 0.95, "bare forward of the same 16 layers")]

"""The table of live capture and loading on a GPU: ``python -m tests.benchmarks.bench_gpu``. It needs only torch and
transformers; peers that are not installed are left out.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from actstore.hooks.model import HookedModel
from tests.benchmarks import bench_hooks, bench_hooks_memory, bench_loader_gpu
from tests.benchmarks.bench_hooks import Setting
from tests.benchmarks.measure import Against, Result, Speed, interleaved
from tests.benchmarks.results import section
from tests.gpu import llama, transfer


def main() -> int:
    """Print the table and return 0, as ``make bench`` does: a missed target is marked, and is no error."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not torch.cuda.is_available():
        print("there is no CUDA device; nothing was run")
        return 0
    with tempfile.TemporaryDirectory(prefix="actstore-bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        setting = on_gpu(save(folder / "model"))
        results = [
            *bench_hooks.run(setting),
            *bench_hooks_memory.run(setting),
            *transfers(),
            *bench_loader_gpu.run(folder),
        ]
        print(section(results, folder))
    return 0


def on_gpu(model: Path) -> Setting:
    """Half of the layers: all hooks of all layers would take 70 GB."""
    return Setting(
        model,
        "Llama 1B bf16",
        "bfloat16",
        "cuda",
        n_layers=8,
        batch=llama.BATCH,
        context=llama.CONTEXT,
        n_forwards=10,
    )


def save(folder: Path, device: str = "cuda") -> Path:
    """Save the random Llama, with the tokenizer that peers need."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    llama.build(device).save_pretrained(folder)
    vocabulary = {f"t{index}": index for index in range(llama.N_IDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t0", eos_token="t1", pad_token="t1"
    ).save_pretrained(folder)
    return folder


def transfers(device: str = "cuda") -> list[Result]:
    """Measure copies of three residual streams to pinned host memory, of all layers."""
    model = HookedModel(llama.build(device))
    rates = interleaved(transfer.sides(model, llama.some_tokens(device), n_batches=8))
    name = f"Llama 1B bf16, {llama.BATCH}x{llama.CONTEXT}: 3 residual streams to pinned host memory"
    bare = Against("bare forward", rates["bare"], 0.95, is_limit=True)
    return [Speed(name, "tokens/s", rates["copies"], (bare,))]


if __name__ == "__main__":
    sys.exit(main())

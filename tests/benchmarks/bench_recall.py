"""`actstore.activations`: reading prompts that a store has, compared with `Store.cache` of the same rows, and computing
those that it lacks, compared with the bare forward.
"""

import itertools
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import actstore
from actstore.hooks.naming.names import HookName
from tests.benchmarks.measure import Against, Result, Speed, Work, interleaved, timed

_LAYERS: Final = (7, 15, 22, 29)
_HOOKS: Final[tuple[HookName, ...]] = tuple(f"blocks.{layer}.hook_resid_post" for layer in _LAYERS)
_N_PROMPTS: Final = 128
_LENGTH: Final = 32


def run(model: Path, folder: Path, *, turns: int = 3) -> list[Result]:
    """Measure hits in turns with `Store.cache`, and misses in turns with the forward alone."""
    rng = np.random.default_rng(0)
    hooked = actstore.HookedModel.from_pretrained(model, dtype="bfloat16")
    prompts = torch.from_numpy(rng.integers(2, 40_000, size=(_N_PROMPTS, _LENGTH)))
    url = folder / "recall"
    actstore.activations(hooked, prompts, _HOOKS, url)
    store = actstore.open(url)
    rows = list(range(_N_PROMPTS))

    def hits() -> float:
        actstore.activations(hooked, prompts, _HOOKS, url)
        return _N_PROMPTS

    def cached() -> float:
        store.cache(rows, names_filter=[str(hook) for hook in _HOOKS], model=hooked)
        return _N_PROMPTS

    base: Any = hooked.hf.model

    def bare(batch_size: int = _N_PROMPTS) -> float:
        with torch.inference_mode():
            for start in range(0, _N_PROMPTS, batch_size):
                batch = prompts[start : start + batch_size]
                base(input_ids=batch, use_cache=False, output_hidden_states=True)
        return _N_PROMPTS

    numbers = itertools.count()

    def misses() -> Work:
        new = folder / f"recall-{next(numbers)}"
        work = timed(lambda: _made(hooked, prompts, new))()
        shutil.rmtree(new)
        return work

    read = interleaved({"hits": timed(hits), "cache": timed(cached)}, turns=turns)
    batch_size = store.plan.request.batch_size
    in_batches = timed(lambda: bare(batch_size))
    computed = interleaved({"misses": misses, "bare": timed(bare), "in batches": in_batches}, turns=turns)
    what = f"{_N_PROMPTS} prompts of {_LENGTH} tokens, SmolLM2-135M bf16, 4 layers"
    return [
        Speed(
            f"activations, all in the store: {what}",
            "prompts/s",
            read["hits"],
            (Against("store.cache of these rows, of an open store", read["cache"], 0.8),),
        ),
        Speed(
            f"activations, none in the store: {what}",
            "prompts/s",
            computed["misses"],
            (
                Against("bare forward in one batch, nothing stored", computed["bare"], 0.95, is_limit=True),
                Against(f"the same in batches of {batch_size}", computed["in batches"], 0.95, is_limit=True),
            ),
        ),
    ]


def _made(model: actstore.HookedModel, prompts: torch.Tensor, store: Path) -> float:
    actstore.activations(model, prompts, _HOOKS, store)
    return len(prompts)

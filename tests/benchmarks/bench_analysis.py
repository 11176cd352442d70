"""Top activations of a store, against the same arithmetic over rows that are in memory already."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

import actstore
from actstore.analysis import top_activations
from tests.benchmarks.loader_store import D_MODEL, HOOK, N_ROWS, store_at
from tests.benchmarks.measure import Against, Result, Speed, interleaved, timed

_BLOCK: Final = 8192
_LATENTS: Final = 4096
_ENCODED: Final = 4
"""Rows are 1 in so many for the SAE, whose encoding takes longer than anything else."""


class ReluSAE(torch.nn.Module):
    """The encoder of a standard SAE, with about 64 latents active at a row."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W_enc = torch.nn.Parameter(torch.randn(D_MODEL, _LATENTS, generator=generator) / D_MODEL**0.5)
        self.b_enc = torch.nn.Parameter(torch.full((_LATENTS,), -2.15))

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows @ self.W_enc + self.b_enc).relu()


def run(folder: Path) -> list[Result]:
    """Measure both in turns, with the same number of cores."""
    values = store_at(folder / "analysis")
    store = actstore.open(str(folder / "analysis"))
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    blocks = torch.split(values, _BLOCK)

    def top_of_one() -> float:
        top_activations(store, HOOK, direction, 20)
        return values.nbytes

    def product(rows: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(1)
        return rows.float() @ direction

    def in_memory() -> float:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(product, blocks):
                pass
        torch.set_num_threads(os.cpu_count() or 1)
        return values.nbytes

    sae: Any = ReluSAE()
    few = values[: N_ROWS // _ENCODED]
    some = slice(0, len(store["blocks.0.hook_resid_post"]) // _ENCODED)

    def top_of_sae() -> float:
        top_activations(store, HOOK, sae, 20, sequences=some)
        return len(few)

    def encoded() -> float:
        with torch.no_grad():
            for rows in torch.split(few, _BLOCK):
                sae.encode(rows.float())
        return len(few)

    one = interleaved({"store": timed(top_of_one), "memory": timed(in_memory)})
    many = interleaved({"store": timed(top_of_sae), "memory": timed(encoded)})
    what = f"rows of {D_MODEL} bf16 of a local store"
    return [
        Speed(
            f"top 20 of a direction: {N_ROWS:,} {what}",
            "MB/s",
            one["store"],
            (Against("products of the same rows in memory", one["memory"], 0.8, is_limit=True),),
            per_unit=1e6,
        ),
        Speed(
            f"top 20 of {_LATENTS:,} latents of an SAE: {len(few):,} {what}",
            "rows/s",
            many["store"],
            (Against("encoding of the same rows in memory", many["memory"], 0.9, is_limit=True),),
        ),
    ]

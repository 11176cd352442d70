"""Measuring an SAE on a store, compared with its bare encode and decode of the same rows in memory."""

from pathlib import Path
from typing import Final

import torch
from sae_lens import TopKSAE, TopKSAEConfig

import actstore
from actstore import analysis
from actstore.storage.local import LocalBlobs
from tests.benchmarks.loader_store import D_MODEL, HOOK, LENGTH, plan_of
from tests.benchmarks.measure import Against, Result, Speed, interleaved, timed
from tests.store.example import write_store

_N_SEQUENCES: Final = 256
_N_ROWS: Final = _N_SEQUENCES * LENGTH
_D_SAE: Final = 4096
_BATCH: Final = 4096
"""Rows that the bare side encodes at once."""


def run(folder: Path) -> list[Result]:
    """Measure the rate of rows of both."""
    plan = plan_of(_N_SEQUENCES)
    values = torch.randn(_N_SEQUENCES, LENGTH, D_MODEL, dtype=torch.bfloat16)
    blobs = LocalBlobs(folder / "sae")
    write_store(blobs, plan, {HOOK: values.view(torch.uint16).numpy()}, range(plan.n_segments))
    store, rows = actstore.open(blobs.url), values.view(_N_ROWS, D_MODEL)
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=_D_SAE, k=32))

    def measured() -> float:
        evaluation = analysis.evaluate_sae(store, HOOK, sae)
        assert evaluation[0].l0 == 32
        return evaluation.n_rows

    def bare() -> float:
        with torch.no_grad():
            for first in range(0, _N_ROWS, _BATCH):
                sae.decode(sae.encode(rows[first : first + _BATCH].float()))
        return _N_ROWS

    rates = interleaved({"measured": timed(measured), "bare": timed(bare)})
    limit = Against("bare encode and decode of rows in memory", rates["bare"], 0.9, is_limit=True)
    name = f"evaluation of one TopK SAE, {D_MODEL} to {_D_SAE}"
    return [Speed(name, "rows/s", rates["measured"], (limit,))]

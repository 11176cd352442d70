"""Second moments of a hook, as principal components need them: a pass over a local store, compared with the bare
product of the same rows in memory.
"""

import os
from pathlib import Path
from typing import Final

import torch

import actstore
from actstore.analysis.geometry.sums.moments import Products, ProductSums
from actstore.analysis.geometry.sums.source import source_of
from actstore.analysis.scanning.scan import scan
from tests.benchmarks.loader_store import D_MODEL, HOOK, LENGTH, N_SEQUENCES, store_at
from tests.benchmarks.measure import Against, Result, Speed, interleaved, timed

_N_SEQUENCES: Final = N_SEQUENCES // 4
_N_ROWS: Final = _N_SEQUENCES * LENGTH


def run(folder: Path, *, turns: int = 3) -> list[Result]:
    """Measure the pass in turns with one product of rows that are float64 already, on all cores."""
    path = folder / "geometry"
    rows = store_at(path)[:_N_ROWS].double()
    store = actstore.open(str(path))
    reduction = ProductSums((source_of(store, HOOK),), ((0, 0),))

    def passed() -> float:
        sums: Products = scan(store, {"sums": reduction}, sequences=slice(_N_SEQUENCES)).results["sums"]
        return float(sums.count)

    def bare() -> float:
        torch.set_num_threads(os.cpu_count() or 1)
        torch.mm(rows.T, rows)
        return float(len(rows))

    rates = interleaved({"pass": timed(passed), "bare": timed(bare)}, turns=turns)
    return [
        Speed(
            f"second moments in float64: {_N_ROWS:,} rows of {D_MODEL:,}, bf16, local store",
            "rows/s",
            rates["pass"],
            (Against("rows.T @ rows, float64 in memory, whole matrix, all cores", rates["bare"], 0.7),),
        )
    ]

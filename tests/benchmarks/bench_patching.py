"""Patching grids of a real model, compared with one forward for every cell and with their matrix products alone."""

import logging
import multiprocessing
import random
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor

from actstore import patching
from actstore.hooks.model import HookedModel
from tests.benchmarks.measure import Against, Figure, Result, Speed, Work, interleaved, timed

CLEAN: Final = "When John and Mary went to the store, Mary gave a bottle of milk to"
CORRUPTED: Final = "When John and Mary went to the store, John gave a bottle of milk to"
_N_CELLS: Final = 20
"""Cells of a side that runs one forward for each; they are drawn at random from the grid in each turn."""
_BUDGET: Final = 1024


@dataclass(frozen=True)
class _Grid:
    """A grid that is measured, and the lowest ratios to the sides that it is compared with."""

    name: str
    hook: str
    axes: tuple[str, ...]
    clean: Tensor
    theirs: str
    against_theirs: float
    against_forward: float | None


def run(folder: Path) -> list[Result]:
    """Measure a grid of the residual stream and one of heads, with prompts that begin alike and that do not."""
    model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")
    corrupted = model.to_tokens(CORRUPTED, prepend_bos=False)
    clean = model.to_tokens(CLEAN, prepend_bos=False)
    other = (corrupted + 7) % 40_000
    first = int((clean != corrupted).nonzero()[0, 1])
    bridge, theirs = _transformer_lens(folder)
    alike = f"prompts alike up to token {first + 1} of {corrupted.shape[1]}"
    stream, heads = ("layer", "pos"), ("layer", "pos", "head")
    name = "get_act_patch_attn_head_out_by_pos"
    grids = [
        _Grid(f"resid_pre, {alike}", "resid_pre", stream, clean, "get_act_patch_resid_pre", 60, 45),
        _Grid(
            "resid_pre, prompts that differ everywhere",
            "resid_pre",
            stream,
            other,
            "get_act_patch_resid_pre",
            20,
            14,
        ),
        _Grid(f"z by head, {alike}", "z", heads, clean, name, 40, None),
        _Grid("z by head, no token alike", "z", heads, other, name, 20, None),
    ]
    results: list[Result] = [_measured(model, bridge, theirs, corrupted, grid) for grid in grids]
    results += _peaks(folder)
    return results


def _transformer_lens(folder: Path) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import patching as theirs
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(str(folder), dtype=torch.float32, device="cpu"), theirs


def _metric(model: HookedModel) -> Callable[[Tensor], Tensor]:
    john, mary = model.to_single_token(" John"), model.to_single_token(" Mary")
    return lambda logits: (logits[:, -1, john] - logits[:, -1, mary]).mean()


def _measured(model: HookedModel, bridge: Any, theirs: Any, corrupted: Tensor, grid: _Grid) -> Speed:
    metric = _metric(model)
    _, cache = model.run_with_cache(grid.clean, names_filter=f"blocks.*.{_LEAVES[grid.hook]}")
    n_positions = corrupted.shape[1]
    sizes = [model.cfg.n_layers, n_positions, model.cfg.n_heads][: len(grid.axes)]
    n_cells = torch.Size(sizes).numel()

    def ours() -> float:
        patching.grid(model, corrupted, cache, metric, grid.hook, grid.axes, positions=-1)
        return n_cells

    def forwards() -> float:
        with torch.inference_mode():
            for _ in range(_N_CELLS):
                metric(model.hf(input_ids=corrupted, use_cache=False).logits)
        return _N_CELLS

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        _, their_cache = bridge.run_with_cache(grid.clean)
    everything = theirs.make_df_from_ranges(sizes, grid.axes)

    def their_cells() -> float:
        """Their function over some of the cells, each of which costs the same."""
        cells = everything.iloc[sorted(random.Random(0).sample(range(n_cells), _N_CELLS))]
        setter = (
            theirs.layer_pos_patch_setter if len(sizes) == 2 else theirs.layer_pos_head_vector_patch_setter
        )
        with torch.inference_mode():
            theirs.generic_activation_patch(
                bridge, corrupted, their_cache, metric, setter, grid.hook, index_df=cells
            )
        return _N_CELLS

    products = _products(
        model, lambda: patching.grid(model, corrupted, cache, metric, grid.hook, grid.axes, positions=-1)
    )

    def multiplied() -> float:
        products()
        return n_cells

    sides: dict[str, Callable[[], Work]] = {
        "ours": timed(ours),
        "theirs": timed(their_cells),
        "forward": timed(forwards),
        "products": timed(multiplied),
    }
    rates = interleaved(sides)
    against = [
        Against(
            "transformer_lens.patching on its Bridge, some of the cells", rates["theirs"], grid.against_theirs
        ),
        Against("the matrix products of the grid alone", rates["products"], 0.7, is_limit=True),
    ]
    if grid.against_forward is not None:
        against.append(Against("one forward of Hugging Face a cell", rates["forward"], grid.against_forward))
    name = f"patching grid of {n_cells:,} cells, SmolLM2-135M float32, {grid.name}"
    return Speed(name, "cells/s", rates["ours"], tuple(against))


_LEAVES: Final = {"resid_pre": "hook_resid_pre", "z": "attn.hook_z"}


def _products(model: HookedModel, act: Callable[[], object]) -> Callable[[], None]:
    """A function that runs the matrix products of an act, with the same sizes and weights, and nothing else."""
    calls: list[tuple[torch.nn.Linear, int]] = []

    forward = torch.nn.Linear.forward

    def counted(module: torch.nn.Linear, values: Tensor) -> Tensor:
        calls.append((module, values.numel() // values.shape[-1]))
        return forward(module, values)

    # A PyTorch hook on a module would have whole rows computed.
    with mock.patch.object(torch.nn.Linear, "forward", counted):
        act()
    inputs = {
        (n_rows, module.in_features): torch.randn(n_rows, module.in_features) for module, n_rows in calls
    }

    def products() -> None:
        with torch.inference_mode():
            for module, n_rows in calls:
                torch.nn.functional.linear(inputs[n_rows, module.in_features], module.weight, module.bias)

    return products


def _peaks(folder: Path) -> Sequence[Figure]:
    """Memory above that of a single forward, with a budget of tokens and without one."""
    results = []
    for budget, target in ((_BUDGET, 150), (None, 700)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            peak = process.submit(_peak, folder, budget).result()
        what = f"max_tokens={budget:,}" if budget else "the default budget"
        results.append(
            Figure(
                f"patching grid of 4,320 cells that all differ, {what}: memory above one forward",
                peak,
                "MB",
                target,
            )
        )
    return results


def _peak(folder: Path, budget: int | None) -> float:
    logging.disable(logging.WARNING)
    model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")
    corrupted = model.to_tokens(CORRUPTED, prepend_bos=False)
    _peak_mb()
    _, cache = model.run_with_cache((corrupted + 7) % 40_000, names_filter="blocks.*.attn.hook_z")
    before = _peak_mb()
    patching.grid(
        model,
        corrupted,
        cache,
        _metric(model),
        "z",
        ("layer", "pos", "head"),
        positions=-1,
        max_tokens=budget,
    )
    return _peak_mb() - before


def _peak_mb() -> float:
    """MB at the peak so far; the peak is forgotten, since loading the model takes more than a grid."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(line.split()[1]) * 1024 / 1e6

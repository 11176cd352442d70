"""Computing cells by the engine that fits the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from actstore.errors import ModelError, PatchError
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import BY_LEAF
from actstore.hooks.naming.names import join
from actstore.hooks.packing.foreign_hooks import hooked_by_others
from actstore.patching.engine.cells import Cells, trimmed
from actstore.patching.engine.measuring import Measuring
from actstore.patching.engine.metric import Metric, measured
from actstore.patching.engine.sweep import sweep
from actstore.patching.engine.whole_rows import whole_rows

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all)."""


@dataclass(frozen=True)
class Computed:
    """The metric of cells, and how it was computed."""

    numbers: "torch.Tensor"
    """Metric of each cell, float64 [cell, 1] or [cell, prompt]."""
    corrupted: "torch.Tensor"
    """Metric of the corrupted run, float64 [1] or [prompt]."""
    engine: str
    """``packed rows``; or ``whole rows`` and the reason."""
    noise_floor: float
    """Largest difference of the unpatched metric between the shapes of batches that were used."""
    n_skipped: int
    """Cells that change nothing, which were not run."""


def computed(
    model: HookedModel,
    tokens: "torch.Tensor",
    cells: Cells,
    metric: Metric,
    positions: Sequence[int],
    *,
    max_tokens: int,
    engine: str | None = None,
    progress: Progress | None = None,
) -> Computed:
    """Compute cells.

    Args:
        model: the model.
        tokens: corrupted prompts, ids [prompt, position].
        cells: what to compute, in ascending order of layers.
        metric: takes logits of ``positions`` [prompt, position, d_vocab].
        positions: positions that the metric sees.
        max_tokens: the most tokens that are on the way at once.
        engine: ``packed rows`` or ``whole rows``; None for the first where it is exact.
        progress: called after each part.

    Raises:
        PatchError: the metric gives something else than numbers.
        ModelError: ``packed rows`` was asked for, and this model cannot be run so.
    """
    return by_engine(
        model,
        engine,
        lambda: _packed(model, tokens, cells, metric, positions, max_tokens, progress),
        lambda: _whole(model, tokens, cells, metric, positions, max_tokens, progress),
    )


def check_engine(engine: str | None) -> None:
    """Check the name of an engine.

    Raises:
        PatchError: there is no such engine.
    """
    if engine not in (None, "packed rows", "whole rows"):
        raise PatchError(f"engine is {engine!r}; choose 'packed rows' or 'whole rows', or leave it out")


def by_engine(
    model: HookedModel, engine: str | None, packed: Callable[[], Computed], whole: Callable[[], Computed]
) -> Computed:
    """Compute by packed rows where they are exact, else by whole rows.

    Args:
        model: the model.
        engine: ``packed rows`` or ``whole rows`` for that one; None to choose.
        packed: computes by packed rows; it raises ModelError where they are not exact.
        whole: computes by whole rows.

    Returns:
        What one of them gives, with the reason if it had to be whole rows.

    Raises:
        ModelError: ``packed rows`` was asked for, and this model cannot be run so.
    """
    reason = "" if engine == "whole rows" else _why_whole(model)
    if reason and engine == "packed rows":
        raise ModelError(f"this model cannot be run as packed rows: {reason}")
    if engine != "whole rows" and not reason:
        try:
            return packed()
        except ModelError as error:
            if engine == "packed rows":
                raise
            reason = str(error)
    computed_whole = whole()
    return replace(computed_whole, engine=f"whole rows: {reason}") if reason else computed_whole


def _why_whole(model: HookedModel) -> str:
    """Why a model cannot be run as packed rows; empty if it can."""
    if model.has_functions:
        return "there are functions on its hooks"
    hooked = hooked_by_others(model.hf)
    if hooked is not None:
        return f"there is a PyTorch hook on {hooked}, which expects whole prompts"
    if model.architecture.attention is None:
        return f"only the residual stream of a {model.cfg.model_type} model is known"
    return ""


def _packed(
    model: HookedModel,
    tokens: "torch.Tensor",
    cells: Cells,
    metric: Metric,
    positions: Sequence[int],
    max_tokens: int,
    progress: Progress | None,
) -> Computed:
    is_recorded = BY_LEAF[cells.leaf].reach == "stream"
    recorded = None if is_recorded else _values(model, tokens, cells)
    with model.packed_run(tokens) as run:
        cells, changed = trimmed(cells, recorded or run.streams.__getitem__, len(tokens))
        measuring = Measuring(run, metric, positions, max_tokens)
        numbers = measuring.corrupted.repeat(len(cells), 1)
        for part, its_numbers in sweep(run, cells, changed, measuring, max_tokens):
            numbers[part] = its_numbers
            if progress is not None:
                progress(part.stop, len(cells))
    n_skipped = int((~changed.any(1)).sum()) if len(cells) else 0
    return Computed(numbers, measuring.corrupted, "packed rows", measuring.noise_floor, n_skipped)


def _values(model: HookedModel, tokens: "torch.Tensor", cells: Cells) -> "Callable[[int], torch.Tensor]":
    """The values of the corrupted run at the hook of the cells, by layer."""
    names = [join(layer, cells.leaf) for layer in sorted(set(cells.layers.tolist()))]
    _, cache = model.run_with_cache(tokens, names_filter=names, return_type=None)
    return lambda layer: cache[join(layer, cells.leaf)]


def _whole(
    model: HookedModel,
    tokens: "torch.Tensor",
    cells: Cells,
    metric: Metric,
    positions: Sequence[int],
    max_tokens: int,
    progress: Progress | None,
) -> Computed:
    chosen = list(positions)
    corrupted = measured(metric, model(tokens)[:, chosen])
    numbers = corrupted.repeat(len(cells), 1)
    noise = 0.0
    n_at_once = 1
    for part, its_numbers in whole_rows(model, tokens, cells, metric, positions, max_tokens):
        numbers[part] = its_numbers
        n_at_once = max(n_at_once, part.stop - part.start)
        if progress is not None:
            progress(part.stop, len(cells))
    if len(cells):
        again = model(tokens.repeat(n_at_once, 1))[: len(tokens), chosen]
        noise = float((measured(metric, again) - corrupted).abs().max())
    return Computed(numbers, corrupted, "whole rows", noise, 0)

"""Grids of cells: one for each layer, and for each position, head or source position."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import ModelError
from actstore.hooks.model import HookedModel
from actstore.memory import free_nbytes
from actstore.patching.axes import HEADS, NEURON, POSITIONS, leaf_of, sizes_of
from actstore.patching.clean import clean_run
from actstore.patching.engine.bounds import token_nbytes
from actstore.patching.engine.cells import Cells
from actstore.patching.engine.computed import Computed, Progress, check_engine, computed
from actstore.patching.engine.metric import Metric, positions_of
from actstore.patching.prompts import prompt_ids
from actstore.patching.results.panels import Axis
from actstore.patching.results.result import PatchResult

if TYPE_CHECKING:
    import torch

_SHARE_OF_MEMORY: Final = 0.125
_LEAST_TOKENS: Final = 4096
_MOST_TOKENS: Final = 1 << 20


def grid(
    model: HookedModel,
    corrupted: "torch.Tensor | str | Sequence[str]",
    clean: Any,
    metric: Metric,
    hook: str = "resid_pre",
    axes: Sequence[str] = ("layer", "pos"),
    *,
    positions: "int | Sequence[int] | None" = None,
    max_tokens: int | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> PatchResult:
    """Patch every cell of a grid: run the corrupted prompts with one value of the clean run, and measure the logits.

    Args:
        model: the model; in float32 unless you want the noise of others.
        corrupted: prompts [prompt, position] as ids, or text. Each cell is patched in all of them together.
        clean: where values come from: a cache of `HookedModel.run_with_cache` or `Store.cache`, or clean prompts.
        metric: takes logits [prompt, position, d_vocab], and gives one number, or one for each prompt.
        hook: what is patched, in TransformerLens' shorthand: ``resid_pre``, ``z``, ``q``, ``pattern``, ``mlp_out``, ...
        axes: the axes of the grid: ``layer``, and ``pos`` (each position by itself; otherwise all at once), ``head``,
            for patterns ``dest_pos`` and ``src_pos``, and ``neuron`` for those of the MLP.
        positions: positions whose logits the metric needs, such as -1, for logits [prompt, len(positions), d_vocab];
            None for all. The last one bounds what has to be computed.
        max_tokens: tokens on the way at once, which bounds memory; None for an eighth of what is free.
        engine: ``packed rows`` or ``whole rows``; None for the first where it is exact for the model.
        progress: called as ``progress(done, total)`` with numbers of cells.

    Raises:
        HookError: the clean values do not have the hook, or the model does not.
        PatchError: prompts that do not line up, a metric that is no number, an axis that the hook does not have.
        ModelError: the model has no head, or cannot be run as ``engine`` asks.
        TokensError: prompts are neither text nor ids of this model.
    """
    began = time.perf_counter()
    tokens = tokens_of(model, corrupted)
    leaf = leaf_of(model.names, hook)
    # What is wrong shows before anything runs.
    sizes_of(model.cfg, leaf, axes, tokens.shape[1])
    chosen = positions_of(positions, tokens.shape[1])
    check_engine(engine)
    layers = range(model.cfg.n_layers)
    clean_side = clean_run(model, clean, {leaf: layers}, metric, chosen, tokens.shape)
    result = replaced_grid(
        model,
        tokens,
        clean_side.values[leaf],
        metric,
        hook,
        axes,
        positions=chosen,
        max_tokens=max_tokens,
        engine=engine,
        progress=progress,
    )
    return replace(result, clean=clean_side.number, seconds=time.perf_counter() - began)


def replaced_grid(
    model: HookedModel,
    tokens: "torch.Tensor",
    new: "Callable[[int], torch.Tensor]",
    metric: Metric,
    hook: str,
    axes: Sequence[str],
    *,
    positions: "int | Sequence[int] | None" = None,
    max_tokens: int | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> PatchResult:
    """A grid of cells that replace values by new ones, whatever these are.

    Args:
        model: the model.
        tokens: ids [prompt, position].
        new: gives the new values of a layer, shaped like those of the hook.
        metric: takes logits [prompt, position, d_vocab], and gives one number, or one for each prompt.
        hook: what is replaced.
        axes: see `grid`, as for the other arguments.

    Returns:
        The result, with no clean metric.
    """
    began = time.perf_counter()
    leaf = leaf_of(model.names, hook)
    sizes = sizes_of(model.cfg, leaf, axes, tokens.shape[1])
    chosen = positions_of(positions, tokens.shape[1])
    result = computed(
        model,
        tokens,
        cells_of(leaf, axes, sizes, tokens.shape[1], new),
        metric,
        chosen,
        max_tokens=max_tokens or default_tokens(model, len(tokens) * len(chosen)),
        engine=engine,
        progress=progress,
    )
    labels = labelled(model, axes, sizes, tokens, 1)
    return result_of(model, result, labels, hook, time.perf_counter() - began)


def result_of(
    model: HookedModel, computed_cells: Computed, axes: Sequence[Axis], hook: str, seconds: float
) -> PatchResult:
    """The result of cells that fill these axes, the last one fastest; an axis of prompts comes first if there are such.

    Args:
        model: the model.
        computed_cells: the metric of the cells.
        axes: their axes.
        hook: what was replaced.
        seconds: how long it took.

    Returns:
        The result, with no clean metric.
    """
    values = computed_cells.numbers.float().T.reshape(-1, *(len(axis.labels) for axis in axes))
    labels = list(axes)
    if len(values) > 1:
        labels.insert(0, Axis("prompt", tuple(map(str, range(len(values))))))
    return PatchResult(
        values=values if len(values) > 1 else values[0],
        axes=tuple(labels),
        hook=hook,
        model_name=model.cfg.model_name,
        corrupted=computed_cells.corrupted.float().squeeze(),
        clean=None,
        engine=computed_cells.engine,
        noise_floor=computed_cells.noise_floor,
        n_skipped=computed_cells.n_skipped,
        seconds=seconds,
    )


def tokens_of(model: HookedModel, corrupted: "torch.Tensor | str | Sequence[str]") -> "torch.Tensor":
    """The corrupted prompts as ids [prompt, position], on the device of the model.

    Raises:
        ModelError: the model has no head.
        PatchError: texts have different numbers of tokens.
        TokensError: they are neither text nor ids of this model.
    """
    if not model.has_head:
        raise ModelError(
            "this model was loaded without its head, so there are no logits to measure; load it with one"
        )
    return prompt_ids(model, corrupted, "corrupted")


def default_tokens(model: HookedModel, n_logits: int) -> int:
    """Tokens whose residual streams take an eighth of the free memory of the model's device, beside logits.

    Args:
        model: the model.
        n_logits: prompts times positions whose logits a metric is given at once.
    """
    itemsize = model.dtype.itemsize
    # Those of the recorded run, and those of a cell.
    logits = 2 * n_logits * model.cfg.d_vocab * itemsize
    room = int(free_nbytes(model.device) * _SHARE_OF_MEMORY) - logits
    return min(max(room // token_nbytes(model.cfg.d_model, itemsize), _LEAST_TOKENS), _MOST_TOKENS)


def cells_of(leaf: str, axes: Sequence[str], sizes: Sequence[int], length: int, new: Any) -> Cells:
    """All cells of a grid, the last axis fastest."""
    import torch

    columns = dict(
        zip(
            axes,
            (part.flatten() for part in torch.meshgrid(*map(torch.arange, sizes), indexing="ij")),
            strict=True,
        )
    )
    layers = columns["layer"]
    position = next((columns[axis] for axis in POSITIONS if axis in columns), None)
    return Cells(
        leaf=leaf,
        layers=layers,
        starts=torch.zeros_like(layers) if position is None else position,
        stops=torch.full_like(layers, length) if position is None else position + 1,
        heads=next((columns[axis] for axis in (*HEADS, NEURON) if axis in columns), None),
        sources=columns.get("src_pos"),
        new=new,
    )


def labelled(
    model: HookedModel, axes: Sequence[str], sizes: Sequence[int], tokens: "torch.Tensor", n_numbers: int
) -> tuple[Axis, ...]:
    """The axes of a grid with a label for each index, after an axis of prompts if each of them has a number."""
    prompts = [Axis("prompt", tuple(map(str, range(n_numbers))))] if n_numbers > 1 else []
    return (
        *prompts,
        *(Axis(name, _labels(model, name, size, tokens)) for name, size in zip(axes, sizes, strict=True)),
    )


def _labels(model: HookedModel, axis: str, size: int, tokens: "torch.Tensor") -> tuple[str, ...]:
    if axis in (*POSITIONS, "src_pos") and len(tokens) == 1 and model.has_tokenizer:
        texts = model.to_str_tokens(tokens[0])
        return tuple(f"{position}: {text}" for position, text in enumerate(texts))
    return tuple(map(str, range(size)))

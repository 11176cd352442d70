"""Grids of cells that ablate values, and sets of parts that are ablated together."""

import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actstore.errors import PatchError
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import BY_LEAF
from actstore.patching.ablation.replacement import New, Value, replacement
from actstore.patching.axes import leaf_of, sizes_of
from actstore.patching.engine.cells import PATTERNS
from actstore.patching.engine.computed import Computed, Progress, by_engine, check_engine
from actstore.patching.engine.metric import Metric, positions_of
from actstore.patching.engine.packed_variants import VariantEdit
from actstore.patching.engine.variants import packed, whole
from actstore.patching.grid import default_tokens, replaced_grid, result_of, tokens_of
from actstore.patching.results.panels import Axis
from actstore.patching.results.result import PatchResult

if TYPE_CHECKING:
    import torch


def ablate(
    model: HookedModel,
    tokens: "torch.Tensor | str | Sequence[str]",
    metric: Metric,
    hook: str = "z",
    axes: Sequence[str] = ("layer", "head"),
    value: Value = "zero",
    *,
    source: Any = None,
    by_position: bool = False,
    seed: int = 0,
    together: Sequence[Sequence[Any]] | None = None,
    positions: "int | Sequence[int] | None" = None,
    max_tokens: int | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> PatchResult:
    """Ablate every cell of a grid: replace one value by one that says nothing of the prompt, and measure the logits.

    Args:
        model: the model; in float32 unless you want the noise of others.
        tokens: prompts [prompt, position] as ids, or text. Each cell is ablated in all of them together.
        metric: takes logits [prompt, position, d_vocab], and gives one number, or one for each prompt.
        hook: what is ablated, in shorthand: ``z``, ``mlp_out``, ``attn_out``, ``mlp.hook_post``, ...
        axes: the axes of the grid: ``layer``, and ``pos``, ``head`` and others; see `actstore.patching.grid`.
        value: ``zero``; ``mean`` for the mean of the source; or ``resample`` for values of other prompts at the same
            position, drawn from the source.
        source: for means, a store, or another object with ``stats(name).mean``; a cache, or a mapping of means by name;
            or prompts. For values of others, a cache, such as ``store.cache(range(100))``, or prompts. None for the
            prompts themselves.
        by_position: whether the mean of each position is taken by itself, over prompts of the same length.
        seed: seed of the drawing of prompts. If they are drawn from the prompts themselves, none keeps its own.
        together: sets of parts to ablate together, instead of a grid: heads ``(layer, head)``, or layers.
        positions: positions whose logits the metric needs; see `actstore.patching.grid`.
        max_tokens: tokens on the way at once, which bounds memory; None for an eighth of what is free.
        engine: ``packed rows`` or ``whole rows``; None for the first where it is exact for the model.
        progress: called as ``progress(done, total)`` with numbers of cells.

    Returns:
        The metric of each cell, with the axes of the grid, or with the axis ``set``. ``corrupted`` is that of the
        prompts as they are, and ``difference`` what ablation changes.

    Raises:
        HookError: the model or the source does not have the hook.
        PatchError: a source that does not fit, a metric that is no number, an axis that the hook does not have.
        ModelError: the model has no head, or cannot be run as ``engine`` asks.
    """
    began = time.perf_counter()
    ids = tokens_of(model, tokens)
    leaf = leaf_of(model.names, hook)
    sets = None if together is None else _sets(model, leaf, together)
    if sets is None:
        sizes_of(model.cfg, leaf, axes, ids.shape[1])
    chosen = positions_of(positions, ids.shape[1])
    check_engine(engine)
    layers = (
        range(model.cfg.n_layers) if sets is None else sorted({layer for its in sets for layer, _ in its})
    )
    new = replacement(model, ids, leaf, value, source, layers=layers, by_position=by_position, seed=seed)
    if sets is None:
        result = replaced_grid(
            model,
            ids,
            new,
            metric,
            hook,
            axes,
            positions=chosen,
            max_tokens=max_tokens,
            engine=engine,
            progress=progress,
        )
        return replace(result, seconds=time.perf_counter() - began)
    edits = [[_edit(leaf, layer, head, new) for layer, head in its] for its in sets]
    max_tokens = max_tokens or default_tokens(model, len(ids) * len(chosen))
    computed = _computed(model, ids, edits, metric, chosen, max_tokens, engine, progress)
    axis = Axis("set", tuple(", ".join(map(_name, its)) for its in sets))
    return result_of(model, computed, [axis], hook, time.perf_counter() - began)


def _sets(
    model: HookedModel, leaf: str, together: Sequence[Sequence[Any]]
) -> list[list[tuple[int, int | None]]]:
    """Sets of (layer, head or None).

    Raises:
        PatchError: a part is not in the model, or the hook has other parts.
    """
    if leaf in PATTERNS:
        raise PatchError(f"patterns cannot be ablated together; give another hook than {leaf}")
    axes = BY_LEAF[leaf].axes
    n_heads = (
        model.cfg.n_key_value_heads if "kv_head" in axes else model.cfg.n_heads if "head" in axes else None
    )
    sets: list[list[tuple[int, int | None]]] = []
    for its in together:
        if not isinstance(its, Iterable):
            raise PatchError(f"together holds {its!r}; give lists of (layer, head), or of layers")
        sets.append([])
        for part in its:
            is_head = isinstance(part, tuple)
            layer, head = part if is_head and len(part) == 2 else (part, None)
            try:
                layer, head = operator.index(layer), None if head is None else operator.index(head)
            except TypeError:
                raise PatchError(
                    f"together holds {part!r}; give (layer, head), or the number of a layer"
                ) from None
            if not 0 <= layer < model.cfg.n_layers or (head is not None and not 0 <= head < (n_heads or 0)):
                heads = f"heads 0 to {n_heads - 1}" if n_heads else "no heads"
                raise PatchError(
                    f"together holds {part!r}; there are layers 0 to {model.cfg.n_layers - 1}, and {heads} at {leaf}"
                )
            sets[-1].append((layer, head))
    if not sets or not all(sets):
        raise PatchError(
            "together is empty, or holds an empty set; give lists of (layer, head), or of layers"
        )
    return sets


def _edit(leaf: str, layer: int, head: int | None, new: New) -> VariantEdit:
    value = new(layer)
    return VariantEdit(layer, leaf, head, 0, value if head is None else value[:, :, head])


def _computed(
    model: HookedModel,
    tokens: "torch.Tensor",
    edits: list[list[VariantEdit]],
    metric: Metric,
    positions: list[int],
    max_tokens: int,
    engine: str | None,
    progress: Progress | None,
) -> Computed:
    """Sets by the engine that fits the model."""

    def by_packed_rows() -> Computed:
        with model.packed_run(tokens) as run:
            return packed(
                run,
                edits,
                metric,
                positions,
                max_tokens=max_tokens,
                progress=progress,
            )

    return by_engine(
        model,
        engine,
        by_packed_rows,
        lambda: whole(model, tokens, edits, metric, positions, max_tokens=max_tokens, progress=progress),
    )


def _name(part: tuple[int, int | None]) -> str:
    layer, head = part
    return str(layer) if head is None else f"{layer}.{head}"

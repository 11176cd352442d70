"""Edge attribution patching: what each edge from a part that writes to a part that reads would change, to first order.

The score of an edge is the step of what the writer adds to the residual stream, from the corrupted to the clean run,
times the gradient of the metric with respect to the stream as the reader alone sees it (arXiv 2310.10348), summed over
positions.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import ModelError
from actstore.hooks.cache.derived import head_results
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.hooks.packing.foreign_hooks import hooked_by_others
from actstore.patching.clean import CleanRun, clean_run
from actstore.patching.engine.metric import Metric, positions_of
from actstore.patching.estimates.edge_result import EdgeScores
from actstore.patching.estimates.edges import mask, readers, writers
from actstore.patching.estimates.norm_jacobian import NormJacobian
from actstore.patching.estimates.readers import gradients_of_readers, names_of_readers
from actstore.patching.estimates.runs import CorruptedRun, corrupted_run
from actstore.patching.grid import tokens_of

if TYPE_CHECKING:
    import torch

_TOLERANCE: Final = {"torch.float32": 1e-3, "torch.float64": 1e-6}
_TOLERANCE_OF_HALVES: Final = 0.1
"""How far the gradients of all readers together may lie from that of the stream, as a share of its norm."""


def edge_scores(
    model: HookedModel,
    corrupted: "torch.Tensor | str | Sequence[str]",
    clean: Any,
    metric: Metric,
    *,
    positions: "int | Sequence[int] | None" = None,
) -> EdgeScores:
    """Score every edge, in two forwards and one backward pass.

    Memory holds the graph of the corrupted run, and d_model numbers a position for each head of the model.

    Args:
        model: the model.
        corrupted: prompts [prompt, position] as ids, or text.
        clean: a cache, of a live run or of a store, with ``hook_mlp_out`` and ``attn.hook_z`` of all layers and
            ``blocks.0.hook_resid_pre``; or prompts.
        metric: takes logits [prompt, position, d_vocab], and gives one number, or one for each prompt, as a tensor with
            a gradient. Scores are means over prompts then.
        positions: positions whose logits the metric needs, such as -1; None for all.

    Raises:
        HookError: a value of the clean side is missing.
        PatchError: prompts that do not line up, or a metric without a gradient.
        ModelError: the model has no head, its edges are not known, its weights cannot be read, or there are functions
            on its hooks or PyTorch hooks on its modules.
    """
    import torch

    began = time.perf_counter()
    if model.has_functions:
        raise ModelError(
            "there are functions on hooks of this model, and edges are those of the model alone; remove them first"
        )
    hooked = hooked_by_others(model.hf)
    if hooked is not None:
        raise ModelError(
            f"there is a PyTorch hook on {hooked}, and edges are those of the model alone; remove it first"
        )
    tokens = tokens_of(model, corrupted)
    chosen = positions_of(positions, tokens.shape[1])
    names = names_of_readers(model)
    layers = range(model.cfg.n_layers)
    leaves = {"hook_resid_pre": [0], "attn.hook_z": layers, "hook_mlp_out": layers}
    clean_side = clean_run(model, clean, leaves, metric, chosen, tokens.shape)
    names += [join(layer, leaf) for leaf, its_layers in leaves.items() for layer in its_layers]
    run = corrupted_run(model, tokens, names, metric, chosen)
    steps = _steps(model, clean_side, run).flatten(1)  # [writer, prompt and position and feature]
    scores, total = [], torch.zeros(())
    for _, groups in gradients_of_readers(model, run):
        for group in groups:
            scores.append(steps @ group.flatten(1).T)
            total = total + group.sum(0)
    _check_total(model, total, run)
    n_rows = len(run.metric)  # a mean over prompts, if each of them has a number
    is_edge = torch.tensor([*mask(model)])
    matrix = (torch.cat(scores, 1) / n_rows).cpu().masked_fill(~is_edge, float("nan"))
    return EdgeScores(
        scores=matrix,
        upstream=tuple(node.name for node in writers(model)),
        downstream=tuple(node.name for node in readers(model)),
        model_name=model.cfg.model_name,
        corrupted=float(run.metric.mean()),
        clean=None if clean_side.metric is None else float(clean_side.metric.mean()),
        seconds=time.perf_counter() - began,
    )


def _steps(model: HookedModel, clean: CleanRun, run: CorruptedRun) -> "torch.Tensor":
    """What each writer adds in the clean run and not in the corrupted one [writer, prompt, position, d_model]."""
    import torch

    def step(leaf: str, layer: int) -> "torch.Tensor":
        return clean.values[leaf](layer).float() - run.values[join(layer, leaf)].float()

    family = model.architecture
    assert family.attention is not None
    parts = [step("hook_resid_pre", 0)[None]]
    for layer in range(model.cfg.n_layers):
        weight = model.weights.blocks[layer].attn.W_O.detach().float()
        by_head = head_results(step("attn.hook_z", layer), weight).movedim(2, 0)
        if family.ln1_post is not None:
            # The norm sees the sum of all heads; a step of one of them passes it to first order.
            module = model.layers[layer]
            projection = module.get_submodule(f"{family.attention.module}.{family.attention.out}")
            with torch.no_grad():
                written = projection(run.values[join(layer, "attn.hook_z")].flatten(2))
            norm = NormJacobian(module.get_submodule(family.ln1_post), family.norm, written)
            by_head = norm.of_step(by_head)
        parts += [by_head, step("hook_mlp_out", layer)[None]]
    return torch.cat(parts)


def _check_total(model: HookedModel, total: "torch.Tensor", run: CorruptedRun) -> None:
    """Check that the readers together have the gradient of the stream that all of them read.

    Raises:
        ModelError: they have not, so there are readers that the table of families does not know.
    """
    whole = run.gradients["blocks.0.hook_resid_pre"].float()
    off, size = float((total - whole).norm()), float(whole.norm())
    if not off <= _TOLERANCE.get(str(model.dtype), _TOLERANCE_OF_HALVES) * size:
        raise ModelError(
            f"heads, MLPs and logits of this {model.cfg.model_type} model have another gradient together than the "
            f"stream they read (off by {off:.1g} of {size:.1g}), so something else reads it"
        )

"""Variants of a run with several edits each, such as the receivers of a path: what each replaces, and by what."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.hooks.packing.packed_run import PackedRun
from actstore.patching.engine.bounds import tokens_of_forward
from actstore.patching.engine.computed import Computed, Progress
from actstore.patching.engine.measuring import Measuring
from actstore.patching.engine.metric import Metric, measured
from actstore.patching.engine.packed_variants import VariantEdit, packed_variants

if TYPE_CHECKING:
    import torch


def packed(
    run: PackedRun,
    edits: Sequence[Sequence[VariantEdit]],
    metric: Metric,
    positions: Sequence[int],
    *,
    max_tokens: int,
    progress: Progress | None = None,
) -> Computed:
    """Compute variants as packed rows.

    Args:
        run: the corrupted run.
        edits: the edits of each variant, made together; one without edits has exactly the metric of the corrupted run.
        metric: takes logits of ``positions`` [prompt, position, d_vocab].
        positions: positions that the metric sees.
        max_tokens: the most tokens that are on the way at once.
        progress: called after each part.

    Raises:
        PatchError: the metric gives something else than numbers.
        ModelError: unpatched rows have not ended where the recorded run did.
    """
    measuring = Measuring(run, metric, positions, max_tokens)
    numbers = measuring.corrupted.repeat(len(edits), 1)
    # An edit behind the last position that the metric sees is not seen.
    moved = [number for number, its in enumerate(edits) if any(edit.start <= max(positions) for edit in its)]
    done = 0
    for part, its_numbers in packed_variants(run, edits, moved, measuring, max_tokens):
        numbers[part] = its_numbers
        done += len(part)
        if progress is not None:
            progress(done, len(edits))
    n_skipped = len(edits) - len(moved)
    return Computed(numbers, measuring.corrupted, "packed rows", measuring.noise_floor, n_skipped)


def whole(
    model: HookedModel,
    tokens: "torch.Tensor",
    edits: Sequence[Sequence[VariantEdit]],
    metric: Metric,
    positions: Sequence[int],
    *,
    max_tokens: int,
    progress: Progress | None = None,
) -> Computed:
    """Compute variants as whole rows, several in one forward where memory allows it.

    Args:
        model: the model; functions on its hooks are called.
        tokens: corrupted prompts, ids [prompt, position].
        edits: the edits of each variant, made together.
        metric: takes logits of ``positions`` [prompt, position, d_vocab].
        positions: positions that the metric sees.
        max_tokens: tokens on the way at once, which bound those of one forward; at least those of one variant.
        progress: called after each part.

    Raises:
        PatchError: the metric gives something else than numbers.
    """
    import torch

    chosen = list(positions)
    corrupted = measured(metric, model(tokens)[:, chosen])
    numbers = corrupted.repeat(len(edits), 1)
    moved = [number for number, its in enumerate(edits) if its]
    n_at_once = max(1, tokens_of_forward(model, max_tokens) // tokens.numel())
    for first in range(0, len(moved), n_at_once):
        part = moved[first : first + n_at_once]
        hooks = list(_functions([edits[number] for number in part], len(tokens)))
        logits = model.run_with_hooks(tokens.repeat(len(part), 1), fwd_hooks=hooks)[:, chosen]
        by_variant = logits.view(len(part), len(tokens), *logits.shape[1:])
        numbers[part] = torch.stack([measured(metric, its_logits) for its_logits in by_variant])
        if progress is not None:
            progress(first + len(part), len(edits))
    noise = 0.0
    if moved:
        again = model(tokens.repeat(min(n_at_once, len(moved)), 1))[: len(tokens), chosen]
        noise = float((measured(metric, again) - corrupted).abs().max())
    return Computed(numbers, corrupted, "whole rows", noise, len(edits) - len(moved))


def _functions(edits: Sequence[Sequence[VariantEdit]], n_prompts: int) -> "Iterator[tuple[str, _Edit]]":
    """Functions on hooks that edit variants which lie one after the other in a batch."""
    by_name: dict[str, list[tuple[int, VariantEdit]]] = {}
    for variant, its in enumerate(edits):
        for edit in its:
            by_name.setdefault(join(edit.layer, edit.leaf), []).append((variant, edit))
    for name, numbered in by_name.items():
        yield name, _Edit(numbered, n_prompts)


class _Edit:
    """The function on one hook."""

    def __init__(self, numbered: Sequence[tuple[int, VariantEdit]], n_prompts: int) -> None:
        self._numbered = numbered
        self._n_prompts = n_prompts

    def __call__(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        del hook
        for variant, edit in self._numbered:
            rows = value[variant * self._n_prompts : (variant + 1) * self._n_prompts]
            edit.put(rows, 0)

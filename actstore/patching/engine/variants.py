"""Variants of a run with several edits each, such as the receivers of a path: what each replaces, and by what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.errors import ModelError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.patching.engine.computed import Computed, Progress, check_drift, why_whole
from actstore.patching.engine.metric import Metric, measured
from actstore.patching.engine.packed_variants import VariantEdit, packed_variants

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Task:
    """What all variants share."""

    model: HookedModel
    tokens: "torch.Tensor"
    metric: Metric
    positions: list[int]
    max_tokens: int
    progress: Progress | None


def variants(
    model: HookedModel,
    tokens: "torch.Tensor",
    edits: Sequence[Sequence[VariantEdit]],
    metric: Metric,
    positions: Sequence[int],
    *,
    max_tokens: int,
    engine: str | None = None,
    progress: Progress | None = None,
) -> Computed:
    """Run the prompts once for each variant, with its edits made together.

    Args:
        model: the model.
        tokens: corrupted prompts, ids [prompt, position].
        edits: the edits of each variant; one without edits has exactly the metric of the corrupted run.
        metric: takes logits of ``positions`` [prompt, position, d_vocab].
        positions: positions that the metric sees.
        max_tokens: the most tokens that are on the way at once.
        engine: ``packed rows`` or ``whole rows``; None for the first where it is exact.
        progress: called after each part.

    Returns:
        The metric of each variant.

    Raises:
        PatchError: the metric gives something else than numbers.
        ModelError: ``packed rows`` was asked for, and this model cannot be run so.
    """
    task = _Task(model, tokens, metric, list(positions), max_tokens, progress)
    reason = "" if engine == "whole rows" else why_whole(model)
    if reason and engine == "packed rows":
        raise ModelError(f"this model cannot be run as packed rows: {reason}")
    if engine != "whole rows" and not reason:
        try:
            return _packed(task, edits)
        except ModelError as error:
            if engine == "packed rows":
                raise
            reason = str(error)
    return _whole(task, edits, f"whole rows: {reason}" if reason else "whole rows")


def _packed(task: _Task, edits: Sequence[Sequence[VariantEdit]]) -> Computed:
    done = 0
    noise = 0.0
    stop = max(task.positions) + 1
    with task.model.packed_run(task.tokens) as run:
        corrupted = measured(task.metric, run.logits[:, task.positions], is_in_turn=True)
        numbers = corrupted.repeat(len(edits), 1)
        # An edit behind the last position that the metric sees is not seen.
        moved = [number for number, its in enumerate(edits) if any(edit.start < stop for edit in its)]
        for part, swept in packed_variants(run, edits, moved, task.metric, task.positions, task.max_tokens):
            check_drift(task.model, swept.drift)
            numbers[part] = swept.numbers
            noise = max(noise, float((swept.controls - corrupted).abs().max()))
            done += len(part)
            if task.progress is not None:
                task.progress(done, len(edits))
    return Computed(numbers, corrupted, "packed rows", noise, len(edits) - len(moved))


def _whole(task: _Task, edits: Sequence[Sequence[VariantEdit]], name: str) -> Computed:
    import torch

    corrupted = measured(task.metric, task.model(task.tokens)[:, task.positions])
    numbers = corrupted.repeat(len(edits), 1)
    moved = [number for number, its in enumerate(edits) if its]
    n_at_once = max(1, task.max_tokens // task.tokens.numel())
    for first in range(0, len(moved), n_at_once):
        part = moved[first : first + n_at_once]
        hooks = list(_functions([edits[number] for number in part], len(task.tokens)))
        logits = task.model.run_with_hooks(task.tokens.repeat(len(part), 1), fwd_hooks=hooks)
        by_variant = logits[:, task.positions].unflatten(0, (len(part), -1))
        numbers[part] = torch.stack([measured(task.metric, its_logits) for its_logits in by_variant])
        if task.progress is not None:
            task.progress(first + len(part), len(edits))
    noise = 0.0
    if moved:
        again = task.model(task.tokens.repeat(min(n_at_once, len(moved)), 1))[: len(task.tokens)]
        noise = float((measured(task.metric, again[:, task.positions]) - corrupted).abs().max())
    return Computed(numbers, corrupted, name, noise, len(edits) - len(moved))


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

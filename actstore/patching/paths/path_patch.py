"""Path patching: the effect of what some parts of a model send directly to others."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import PatchError
from actstore.hooks.model import HookedModel
from actstore.patching.clean import clean_values
from actstore.patching.engine.computed import Computed, Progress
from actstore.patching.engine.metric import Metric, measured, positions_of
from actstore.patching.engine.packed_variants import VariantEdit
from actstore.patching.engine.variants import variants
from actstore.patching.grid import clean_metric, default_tokens
from actstore.patching.paths.arriving import CleanOf, arriving
from actstore.patching.paths.nodes import (
    ReceiverGroups,
    SenderGroups,
    receiver_groups,
    sender_groups,
)
from actstore.patching.results.panels import Axis
from actstore.patching.results.result import PatchResult

if TYPE_CHECKING:
    import torch

_TOKENS_AT_ONCE: Final = 4096
"""Tokens of one run with frozen heads and MLPs; at least those of one group of senders."""
_VALUES_BYTES: Final = 256 << 20
"""Bytes of what arrives at receivers that are kept at once."""


def path_patch(
    model: HookedModel,
    corrupted: "torch.Tensor | str | Sequence[str]",
    clean: Any,
    metric: Metric,
    senders: Any,
    receivers: Any,
    *,
    positions: "int | Sequence[int] | None" = None,
    max_tokens: int | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> PatchResult:
    """Patch the direct paths from senders to receivers, and measure the logits.

    For each cell, the corrupted prompts run with the clean values of the senders, while all other heads and MLPs stay
    as they are in the corrupted run. What then arrives at the receivers is put into a second run of the corrupted
    prompts, in which nothing else is held. Norms behind attention and MLPs are part of what a sender writes.

    Args:
        model: the model; in float32 unless you want the noise of others.
        corrupted: prompts [prompt, position] as ids, or text. Paths are patched at all positions.
        clean: where values come from: a cache of `HookedModel.run_with_cache` or `Store.cache` with ``attn.hook_z``,
            and ``hook_mlp_out`` for MLPs that send; or clean prompts.
        metric: takes logits [prompt, position, d_vocab], and gives one number, or one for each prompt.
        senders: ``heads`` or ``mlps``, or a list of ``(layer, head)`` and ``(layer, "mlp")``. A list inside of the list
            sends together.
        receivers: ``q``, ``k``, ``v``, ``mlps`` or ``logits``, or a list of ``(layer, head, "q")`` and others like it,
            ``(layer, "mlp")`` and ``logits``. A list inside of the list receives together. Heads of keys and values
            are those that the model has, which groups of queries share.
        positions: positions whose logits the metric needs; see `actstore.patching.grid`.
        max_tokens: tokens on the way at once, which bounds memory; None for an eighth of what is free.
        engine: ``packed rows`` or ``whole rows``; None for the first where it is exact for the model.
        progress: called as ``progress(done, total)`` with numbers of cells.

    Returns:
        The metric of every pair of senders and receivers. All heads have the axes ``layer`` and ``head`` as senders,
        ``to_layer`` and ``to_head`` (``to_kv_head``) as receivers; lists have ``sender`` and ``receiver``. An axis of
        one is left out, if there is another. Senders that do not come before a receiver have no effect on it.

    Raises:
        HookError: the model has no heads that are known, or the clean values are missing.
        PatchError: prompts that do not line up, or senders or receivers that the model does not have.
        ModelError: the model has no head, or cannot be run as ``engine`` asks.
    """
    import torch

    began = time.perf_counter()
    tokens = corrupted if isinstance(corrupted, torch.Tensor) else model.to_tokens(corrupted)
    tokens = (tokens[None] if tokens.ndim == 1 else tokens).to(model.device)
    if tokens.numel() == 0:
        raise PatchError("there are no corrupted tokens; give at least one prompt with one token")
    from_groups, sender_axes = sender_groups(model, senders)
    to_groups, receiver_axes = receiver_groups(model, receivers)
    task = _Task(
        model, tokens, metric, positions_of(positions, tokens.shape[1]), from_groups, to_groups, clean
    )
    computed = task.computed(max_tokens or default_tokens(model), engine, progress)
    axes = [axis for axis in (*sender_axes, *receiver_axes) if len(axis.labels) > 1]
    axes = axes or [*receiver_axes]
    values = computed.numbers.float().T.reshape(-1, *(len(axis.labels) for axis in axes))
    if len(values) > 1:
        axes.insert(0, Axis("prompt", tuple(map(str, range(len(values))))))
    to = receiver_axes[0].labels[0] if len(to_groups) == 1 else "receivers"
    return PatchResult(
        values=values if len(values) > 1 else values[0],
        axes=tuple(axes),
        hook=f"direct paths to {to}",
        model_name=model.cfg.model_name,
        corrupted=computed.corrupted.float().squeeze(),
        clean=clean_metric(model, clean, metric, task.positions, tokens.shape),
        engine=computed.engine,
        noise_floor=computed.noise_floor,
        n_skipped=computed.n_skipped,
        seconds=time.perf_counter() - began,
    )


class _Task:
    """The pairs of groups that are computed; groups of senders are taken in parts."""

    def __init__(
        self,
        model: HookedModel,
        tokens: "torch.Tensor",
        metric: Metric,
        positions: list[int],
        senders: SenderGroups,
        receivers: ReceiverGroups,
        clean: Any,
    ) -> None:
        self.positions = positions
        self._model = model
        self._tokens = tokens
        self._metric = metric
        self._senders = senders
        self._receivers = receivers
        self._every = list(dict.fromkeys(receiver for group in receivers for receiver in group))
        self._is_parallel = model.architecture.is_parallel(model.cfg.original)
        heads = sorted({s.layer for group in senders for s in group if s.head is not None})
        mlps = sorted({s.layer for group in senders for s in group if s.head is None})
        self._z: CleanOf = clean_values(model, clean, "attn.hook_z", heads, tokens.shape) if heads else _none
        self._mlp: CleanOf = clean_values(model, clean, "hook_mlp_out", mlps, tokens.shape) if mlps else _none

    def computed(self, max_tokens: int, engine: str | None, progress: Progress | None) -> Computed:
        import torch

        n_at_once = max(1, min(_TOKENS_AT_ONCE // self._tokens.numel() - 1, _VALUES_BYTES // self._nbytes()))
        n_receivers = len(self._receivers)
        parts = []
        for first in range(0, len(self._senders), n_at_once):
            groups = self._senders[first : first + n_at_once]

            def progressed(done: int, _total: int, first: int = first) -> None:
                assert progress is not None
                progress(first * n_receivers + done, len(self._senders) * n_receivers)

            parts.append(self._part(groups, max_tokens, engine, None if progress is None else progressed))
        return Computed(
            torch.cat([part.numbers for part in parts]),
            parts[0].corrupted,
            parts[0].engine,
            max(part.noise_floor for part in parts),
            sum(part.n_skipped for part in parts),
        )

    def _part(
        self, groups: SenderGroups, max_tokens: int, engine: str | None, progress: Progress | None
    ) -> Computed:
        """The cells of some groups of senders, receivers fastest."""
        arrived, logits = arriving(self._model, self._tokens, groups, self._every, self._z, self._mlp)
        edits: list[list[VariantEdit]] = []
        by_logits: dict[int, int] = {}
        for number, senders in enumerate(groups):
            for receivers in self._receivers:
                if receivers[0].what == "logits":
                    by_logits[len(edits)] = number
                    edits.append([])
                    continue
                its: list[VariantEdit] = []
                for receiver in receivers:
                    if not any(receiver.is_reached_by(sender, self._is_parallel) for sender in senders):
                        continue
                    value = arrived[receiver]
                    start = value.start(number)
                    if start is not None:
                        its.append(
                            VariantEdit(
                                receiver.layer, receiver.leaf, receiver.head, value.values[number], start
                            )
                        )
                edits.append(its)
        computed = variants(
            self._model,
            self._tokens,
            edits,
            self._metric,
            self.positions,
            max_tokens=max_tokens,
            engine=engine,
            progress=progress,
        )
        for cell, number in by_logits.items():
            assert logits is not None
            computed.numbers[cell] = measured(self._metric, logits[number][:, self.positions])
        return Computed(
            computed.numbers,
            computed.corrupted,
            computed.engine,
            computed.noise_floor,
            computed.n_skipped - len(by_logits),
        )

    def _nbytes(self) -> int:
        """Bytes of what arrives at all receivers from one group of senders."""
        cfg = self._model.cfg
        widths = {"mlp": cfg.d_model, "logits": cfg.d_vocab}
        width = sum(widths.get(receiver.what, cfg.d_head) for receiver in self._every)
        return int(self._tokens.numel() * width * self._model.dtype.itemsize)


def _none(layer: int) -> "torch.Tensor":
    raise AssertionError(layer)

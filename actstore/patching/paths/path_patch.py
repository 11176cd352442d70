"""Path patching: the effect of what some parts of a model send directly to others."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.patching.clean import clean_run
from actstore.patching.engine.computed import Computed, Progress, by_engine, check_engine
from actstore.patching.engine.metric import Metric, measured, positions_of
from actstore.patching.engine.packed_variants import VariantEdit
from actstore.patching.engine.variants import packed, whole
from actstore.patching.grid import default_tokens, result_of, tokens_of
from actstore.patching.paths.arrived import Arrived, Clean
from actstore.patching.paths.nodes import (
    ReceiverGroups,
    SenderGroups,
    receiver_groups,
    sender_groups,
)
from actstore.patching.paths.packed_arriving import Corrupted, packed_arriving
from actstore.patching.paths.whole_arriving import whole_arriving
from actstore.patching.results.result import PatchResult

if TYPE_CHECKING:
    import torch

_TOKENS_AT_ONCE: Final = 4096
"""Tokens of the groups of senders that are computed together, at least those of one."""
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
    began = time.perf_counter()
    check_engine(engine)
    tokens = tokens_of(model, corrupted)
    from_groups, sender_axes = sender_groups(model, senders)
    to_groups, receiver_axes = receiver_groups(model, receivers)
    task = _Task(
        model, tokens, metric, positions_of(positions, tokens.shape[1]), from_groups, to_groups, clean
    )
    max_tokens = max_tokens or default_tokens(model, len(tokens) * len(task.positions))
    computed = task.computed(max_tokens, engine, progress)
    axes = [axis for axis in (*sender_axes, *receiver_axes) if len(axis.labels) > 1]
    to = receiver_axes[0].labels[0] if len(to_groups) == 1 else "receivers"
    seconds = time.perf_counter() - began
    result = result_of(model, computed, axes or receiver_axes, f"direct paths to {to}", seconds)
    return replace(result, clean=task.clean_number)


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
        self._layers_sending = {"attn.hook_z": heads, "hook_attn_out": heads, "hook_mlp_out": mlps}
        sending = {"attn.hook_z": heads, "hook_mlp_out": mlps}
        run = clean_run(model, clean, sending, metric, positions, tokens.shape)
        self._clean = Clean(*(run.values[leaf] for leaf in sending))
        self.clean_number = run.number

    def computed(self, max_tokens: int, engine: str | None, progress: Progress | None) -> Computed:
        """All cells, receivers fastest."""
        return by_engine(
            self._model,
            engine,
            lambda: self._packed(max_tokens, progress),
            lambda: self._whole(max_tokens, progress),
        )

    def _packed(self, max_tokens: int, progress: Progress | None) -> Computed:
        corrupted = self._corrupted()
        stop = max(self.positions) + 1

        with self._model.packed_run(self._tokens) as run:
            recorded = run.logits[:, self.positions]

            def logits_of(arrived: Arrived, number: int) -> "torch.Tensor":
                logits = recorded.clone()  # a metric may change its logits
                if arrived.logits is None:
                    return logits
                for index, position in enumerate(self.positions):
                    if position >= arrived.start:
                        logits[:, index] = arrived.logits[number, :, position - arrived.start]
                return logits

            parts = []
            for first, groups in self._parts():
                arrived = packed_arriving(run, groups, self._every, self._clean, corrupted, stop)
                computed = packed(
                    run,
                    self._edits(arrived, groups),
                    self._metric,
                    self.positions,
                    max_tokens=max_tokens,
                    progress=self._progress_from(first, progress),
                )
                parts.append(self._with_logits(computed, arrived, groups, logits_of, is_in_turn=True))
        return _joined(parts)

    def _whole(self, max_tokens: int, progress: Progress | None) -> Computed:
        def logits_of(arrived: Arrived, number: int) -> "torch.Tensor":
            assert arrived.logits is not None
            return arrived.logits[number][:, self.positions]

        parts = []
        for first, groups in self._parts():
            arrived = whole_arriving(self._model, self._tokens, groups, self._every, self._clean)
            computed = whole(
                self._model,
                self._tokens,
                self._edits(arrived, groups),
                self._metric,
                self.positions,
                max_tokens=max_tokens,
                progress=self._progress_from(first, progress),
            )
            parts.append(self._with_logits(computed, arrived, groups, logits_of, is_in_turn=False))
        return _joined(parts)

    def _parts(self) -> Iterator[tuple[int, SenderGroups]]:
        """(number of the first group of senders, groups that are computed together)."""
        n_at_once = max(1, min(_TOKENS_AT_ONCE // self._tokens.numel() - 1, _VALUES_BYTES // self._nbytes()))
        for first in range(0, len(self._senders), n_at_once):
            yield first, self._senders[first : first + n_at_once]

    def _edits(self, arrived: Arrived, groups: SenderGroups) -> list[list[VariantEdit]]:
        """The edits of each cell; logits have none."""
        return [
            [
                VariantEdit(
                    receiver.layer,
                    receiver.leaf,
                    receiver.head,
                    arrived.start,
                    arrived.values[receiver][number],
                )
                for receiver in receivers
                if receiver in arrived.values
                and any(receiver.is_reached_by(sender, self._is_parallel) for sender in senders)
            ]
            for number, senders in enumerate(groups)
            for receivers in self._receivers
        ]

    def _with_logits(
        self,
        computed: Computed,
        arrived: Arrived,
        groups: SenderGroups,
        logits_of: "Callable[[Arrived, int], torch.Tensor]",
        *,
        is_in_turn: bool,
    ) -> Computed:
        """Put in the metric of the cells whose receivers are the logits."""
        n_cells = 0
        for column, receivers in enumerate(self._receivers):
            if receivers[0].what == "logits":
                for number in range(len(groups)):
                    logits = logits_of(arrived, number)
                    cell = number * len(self._receivers) + column
                    computed.numbers[cell] = measured(self._metric, logits, is_in_turn=is_in_turn)
                    n_cells += 1
        return replace(computed, n_skipped=computed.n_skipped - n_cells)

    def _progress_from(self, first: int, progress: Progress | None) -> Progress | None:
        """Progress over all cells, from that over cells of a part."""
        if progress is None:
            return None
        n_receivers = len(self._receivers)
        return lambda done, _total: progress(first * n_receivers + done, len(self._senders) * n_receivers)

    def _corrupted(self) -> Corrupted:
        """The values of the corrupted run that packed rows need."""
        layers = {leaf: set(sending) for leaf, sending in self._layers_sending.items()}
        layers["hook_attn_out"] |= {receiver.layer for receiver in self._every if receiver.what == "mlp"}
        names = [join(layer, leaf) for leaf, its_layers in layers.items() for layer in sorted(its_layers)]
        _, cache = self._model.run_with_cache(self._tokens, names_filter=names, return_type=None)
        return lambda leaf, layer: cache[join(layer, leaf)]

    def _nbytes(self) -> int:
        """Bytes of what arrives at all receivers from one group of senders."""
        cfg = self._model.cfg
        widths = {"mlp": cfg.d_model, "logits": cfg.d_vocab}
        width = sum(widths.get(receiver.what, cfg.d_head) for receiver in self._every)
        return int(self._tokens.numel() * width * self._model.dtype.itemsize)


def _joined(parts: Sequence[Computed]) -> Computed:
    import torch

    return Computed(
        torch.cat([part.numbers for part in parts]),
        parts[0].corrupted,
        parts[0].engine,
        max(part.noise_floor for part in parts),
        sum(part.n_skipped for part in parts),
    )

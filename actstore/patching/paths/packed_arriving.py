"""What arrives at receivers directly, by packed rows.

Since all but the senders is frozen, the stream that a receiver reads is the recorded one, plus what senders add to it.
So only two layers are run for a path: that of the sender, to know what it adds, and that of the receiver, up to what it
makes of the stream. Both run over the positions from the first one on at which a sender differs.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actstore.hooks.capture.visitor import Finished
from actstore.hooks.packing.exactness import check_drift
from actstore.hooks.packing.packed_run import Edit, Group, PackedRun
from actstore.patching.engine.bounds import tokens_at_once
from actstore.patching.paths.arrived import Arrived, Clean
from actstore.patching.paths.nodes import Receiver, Sender

if TYPE_CHECKING:
    import torch


Corrupted = Callable[[str, int], "torch.Tensor"]
"""Gives the value of the corrupted run at a leaf in a layer [prompt, position, ...]."""


def packed_arriving(
    run: PackedRun,
    groups: Sequence[Sequence[Sender]],
    receivers: Sequence[Receiver],
    clean: Clean,
    corrupted: Corrupted,
    stop: int,
) -> Arrived:
    """Compute what arrives at positions before ``stop``.

    Args:
        run: the corrupted run.
        groups: senders that send together.
        receivers: who receives.
        clean: the clean values of the senders.
        corrupted: gives ``attn.hook_z``, ``hook_attn_out`` and ``hook_mlp_out`` of the layers of senders, and
            ``hook_attn_out`` of MLPs that receive.
        stop: position behind the last one that is needed.

    Raises:
        ModelError: what unpatched rows write is not what was recorded.
    """
    start = min((_start(group, clean, corrupted, stop) for group in groups), default=stop)
    if start == stop:
        return Arrived(stop, {}, None)
    return _Arriving(run, groups, clean, corrupted, range(start, stop)).at(receivers)


def _start(group: Sequence[Sender], clean: Clean, corrupted: Corrupted, stop: int) -> int:
    """The first position at which a sender of a group differs, or ``stop``."""
    first = stop
    for sender in group:
        if sender.head is None:
            differs = clean.mlp(sender.layer) != corrupted("hook_mlp_out", sender.layer)
        else:
            differs = (clean.z(sender.layer) != corrupted("attn.hook_z", sender.layer))[:, :, sender.head]
        places = differs.any(-1).any(0).nonzero()
        first = min(first, int(places[0]) if len(places) else stop)
    return first


class _Arriving:
    """Goes through the layers, and adds up what each group has added to the stream so far."""

    def __init__(
        self,
        run: PackedRun,
        groups: Sequence[Sequence[Sender]],
        clean: Clean,
        corrupted: Corrupted,
        positions: range,
    ) -> None:
        self._run = run
        self._groups = groups
        self._clean = clean
        self._corrupted = corrupted
        self._start, self._stop = positions.start, positions.stop
        like = run.streams[0]
        self._n_prompts = len(like)
        self._added = like.new_zeros(len(groups), len(like), len(positions), like.shape[-1])
        """What has been added to the stream [group, prompt, position, d_model]."""

    def at(self, receivers: Sequence[Receiver]) -> Arrived:
        values: dict[Receiver, torch.Tensor] = {}
        for layer in range(len(self._run.streams) - 1):
            here = [receiver for receiver in receivers if receiver.layer == layer]
            sent = self._sent_by_heads(layer)
            if here and (sent is not None or self._has_sent(layer)):
                values |= self._received(layer, here, sent)
            if sent is not None:
                self._added += sent
            for number, group in enumerate(self._groups):
                if Sender(layer, None) in group:
                    step = self._clean.mlp(layer) - self._corrupted("hook_mlp_out", layer)
                    self._added[number] += step[:, self._start : self._stop]
        has_logits = any(receiver.what == "logits" for receiver in receivers)
        return Arrived(self._start, values, self._logits() if has_logits else None)

    def _has_sent(self, layer: int) -> bool:
        """Whether there is a sender before a layer."""
        return any(sender.layer < layer for group in self._groups for sender in group)

    def _sent_by_heads(self, layer: int) -> "torch.Tensor | None":
        """What heads of a layer add to the stream [group, prompt, position, d_model]; None if none of them sends."""
        import torch

        senders = [
            (number, sender.head)
            for number, group in enumerate(self._groups)
            for sender in group
            if sender.layer == layer and sender.head is not None
        ]
        if not senders:
            return None
        numbers = sorted({number for number, _ in senders})
        clean = self._clean.z(layer)[:, self._start : self._stop]
        written: list[torch.Tensor] = []
        sent = torch.zeros_like(self._added)
        for part in _parts(numbers, self._n_at_once() - 1):
            recorded = self._run.streams[layer][:, self._start : self._stop]
            # The first row has no clean value, and so what it writes is what the others write beside the senders.
            stream = recorded.expand(1 + len(part), *recorded.shape)

            def send(value: "torch.Tensor", _number: int, _rows: slice, part: list[int] = part) -> None:
                rows = self._rows(value)
                for number, head in senders:
                    if number in part:
                        rows[1 + part.index(number), :, :, head] = clean[:, :, head]

            def keep(value: "torch.Tensor", _number: int, _rows: slice) -> None:
                written.append(self._rows(value).clone())
                raise Finished

            self._layer(layer, stream, {"attn.hook_z": send, "hook_attn_out": keep})
            writes = written.pop()
            self._check(writes[0], self._corrupted("hook_attn_out", layer))
            sent[part] = writes[1:] - writes[0]
        return sent

    def _received(
        self, layer: int, receivers: Sequence[Receiver], sent: "torch.Tensor | None"
    ) -> "dict[Receiver, torch.Tensor]":
        """What receivers of a layer make of what they read [group, prompt, position, ...]."""
        import torch

        kept: dict[Receiver, list[torch.Tensor]] = {receiver: [] for receiver in receivers}
        leaves = {receiver.leaf for receiver in receivers}
        for part in _parts(range(len(self._groups)), self._n_at_once()):
            stream = self._run.streams[layer][:, self._start : self._stop] + self._added[part]
            missing = set(leaves)
            edits: dict[str, Edit] = {}
            for leaf in leaves:

                def keep(
                    value: "torch.Tensor",
                    _number: int,
                    _rows: slice,
                    leaf: str = leaf,
                    missing: set[str] = missing,
                ) -> None:
                    rows = self._rows(value)
                    for receiver, values in kept.items():
                        if receiver.leaf == leaf:
                            one = rows if receiver.head is None else rows[..., receiver.head, :]
                            values.append(one.clone())
                    missing.discard(leaf)
                    if not missing:
                        raise Finished

                edits[leaf] = keep
            if "hook_mlp_out" in leaves:

                def freeze(value: "torch.Tensor", _number: int, _rows: slice, part: list[int] = part) -> None:
                    rows = self._rows(value)
                    frozen = self._corrupted("hook_attn_out", layer)
                    rows[:] = frozen[:, self._start : self._stop]
                    if sent is not None:
                        rows += sent[part]

                edits["hook_attn_out"] = freeze
            self._layer(layer, stream, edits)
        return {receiver: torch.cat(values) for receiver, values in kept.items()}

    def _logits(self) -> "torch.Tensor":
        stream = self._run.streams[-1][:, self._start : self._stop] + self._added
        return self._run.head(stream.flatten(0, 2)).view(*stream.shape[:3], -1)

    def _layer(self, layer: int, stream: "torch.Tensor", edits: dict[str, Edit]) -> None:
        """Run a layer over streams [row, prompt, position, d_model] for what its edits see."""
        import torch

        prompts = torch.arange(self._n_prompts).repeat(len(stream))
        group = Group(prompts, self._start, self._stop, has_own_keys=False)
        with contextlib.suppress(Finished):
            self._run.layer(layer, stream.flatten(0, 2), [group], edits)

    def _rows(self, value: "torch.Tensor") -> "torch.Tensor":
        """Values [token, ...] as [row, prompt, position, ...]; editing them edits the values."""
        return value.view(-1, self._n_prompts, self._stop - self._start, *value.shape[1:])

    def _n_at_once(self) -> int:
        return max(2, tokens_at_once(self._added.device) // (self._n_prompts * (self._stop - self._start)))

    def _check(self, value: "torch.Tensor", recorded: "torch.Tensor") -> None:
        recorded = recorded[:, self._start : self._stop].float()
        check_drift(self._run, float((value.float() - recorded).norm() / recorded.norm().clamp(min=1e-30)))


def _parts(numbers: Sequence[int], size: int) -> list[list[int]]:
    return [list(numbers[first : first + size]) for first in range(0, len(numbers), size)]

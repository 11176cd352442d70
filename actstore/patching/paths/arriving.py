"""What arrives at receivers directly: a run in which only the senders differ from the corrupted run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.hooks.capture.hook_point import HookFunction, HookPoint
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.patching.paths.nodes import Receiver, Sender

if TYPE_CHECKING:
    import torch

CleanOf = Callable[[int], "torch.Tensor"]
"""Gives the clean values of a layer [prompt, position, ...]."""


@dataclass(frozen=True)
class Arrived:
    """What arrives at one receiver from each group of senders."""

    values: "torch.Tensor"
    """The value of its hook [group, prompt, position, ...], of one head if it is one."""
    corrupted: "torch.Tensor"
    """The same in the corrupted run [prompt, position, ...]."""

    def start(self, group: int) -> int | None:
        """The first position at which something else arrives than in the corrupted run; None if there is none."""
        differs = (self.values[group] != self.corrupted).flatten(2).any(2).any(0)
        places = differs.nonzero()
        return int(places[0]) if len(places) else None


def arriving(
    model: HookedModel,
    tokens: "torch.Tensor",
    groups: Sequence[Sequence[Sender]],
    receivers: Sequence[Receiver],
    clean_z: CleanOf,
    clean_mlp: CleanOf,
) -> "tuple[dict[Receiver, Arrived], torch.Tensor | None]":
    """Run corrupted prompts in which senders give their clean values, and all else gives what it does without them.

    Heads and MLPs beside the senders are frozen at the values of the corrupted run. So what a receiver reads differs
    from that run by what senders write to the stream, and nothing else.

    Args:
        model: the model.
        tokens: corrupted prompts, ids [prompt, position].
        groups: senders that send together; each group is a run of its own, side by side in one batch.
        receivers: who receives.
        clean_z: gives the clean z of the layers with heads that send [prompt, position, head, d_head].
        clean_mlp: gives the clean output of the MLPs that send [prompt, position, d_model].

    Returns:
        (values at the receivers but the logits, logits [group, prompt, position, d_vocab] if they receive).
    """
    run = _FrozenRun(len(tokens), groups, receivers, clean_z, clean_mlp)
    has_logits = any(receiver.what == "logits" for receiver in receivers)
    logits = model.run_with_hooks(
        tokens.repeat(1 + len(groups), 1),
        fwd_hooks=run.functions(model.cfg.n_layers),
        return_type="logits" if has_logits else None,
    )
    return run.arrived, logits.unflatten(0, (1 + len(groups), -1))[1:] if has_logits else None


class _FrozenRun:
    """The functions on hooks of such a run, whose batch begins with the corrupted prompts."""

    def __init__(
        self,
        n_prompts: int,
        groups: Sequence[Sequence[Sender]],
        receivers: Sequence[Receiver],
        clean_z: CleanOf,
        clean_mlp: CleanOf,
    ) -> None:
        self.arrived: dict[Receiver, Arrived] = {}
        self._n_prompts = n_prompts
        self._groups = groups
        self._receivers = receivers
        self._clean_z = clean_z
        self._clean_mlp = clean_mlp

    def functions(self, n_layers: int) -> list[tuple[str, HookFunction]]:
        """Pairs of hooks and functions, up to the last receiver."""
        last = max(receiver.layer for receiver in self._receivers)
        pairs: list[tuple[str, HookFunction]] = []
        for layer in range(min(last + 1, n_layers)):
            for component in ("q", "k", "v"):
                if any(self._at(layer, component)):
                    pairs.append((join(layer, f"attn.hook_{component}"), self._heads))
            pairs.append((join(layer, "attn.hook_z"), self._freeze_heads))
            pairs.append((join(layer, "hook_mlp_out"), self._freeze_mlp))
        return pairs

    def _at(self, layer: int | None, what: str) -> list[Receiver]:
        return [receiver for receiver in self._receivers if receiver.layer == layer and receiver.what == what]

    def _senders(self, layer: int) -> list[tuple[int, Sender]]:
        """The senders of a layer, each with the number of its group."""
        return [
            (number, sender)
            for number, group in enumerate(self._groups)
            for sender in group
            if sender.layer == layer
        ]

    def _runs(self, value: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """(the value in the corrupted run [prompt, ...], that in the run of each group [group, prompt, ...])."""
        runs = value.view(-1, self._n_prompts, *value.shape[1:])
        return runs[0], runs[1:]

    def _heads(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        """Keep what arrives at heads."""
        corrupted, runs = self._runs(value)
        for receiver in self._at(hook.layer(), hook.name[-1]):
            self.arrived[receiver] = Arrived(
                runs[..., receiver.head, :].clone(), corrupted[..., receiver.head, :].clone()
            )

    def _freeze_heads(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        """Give all heads their corrupted values, and those that send their clean ones."""
        corrupted, runs = self._runs(value)
        runs[:] = corrupted
        layer = hook.layer()
        assert layer is not None
        for number, sender in self._senders(layer):
            if sender.head is not None:
                runs[number, ..., sender.head, :] = self._clean_z(layer)[..., sender.head, :]

    def _freeze_mlp(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        """The same for the MLP, after keeping what it gives for what arrives."""
        corrupted, runs = self._runs(value)
        layer = hook.layer()
        assert layer is not None
        for receiver in self._at(layer, "mlp"):
            self.arrived[receiver] = Arrived(runs.clone(), corrupted.clone())
        runs[:] = corrupted
        for number, sender in self._senders(layer):
            if sender.head is None:
                runs[number] = self._clean_mlp(layer)

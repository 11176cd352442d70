"""What arrives at receivers directly, by functions on hooks: one row of a batch for each group of senders."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actstore.hooks.capture.hook_point import HookFunction, HookPoint
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.patching.paths.arrived import Arrived, Clean
from actstore.patching.paths.nodes import Receiver, Sender

if TYPE_CHECKING:
    import torch


def whole_arriving(
    model: HookedModel,
    tokens: "torch.Tensor",
    groups: Sequence[Sequence[Sender]],
    receivers: Sequence[Receiver],
    clean: Clean,
) -> Arrived:
    """Run corrupted prompts in which senders give their clean values, and all else gives what it does without them.

    Args:
        model: the model; functions on its hooks are called.
        tokens: corrupted prompts, ids [prompt, position].
        groups: senders that send together; each group is a run of its own, side by side in one batch.
        receivers: who receives.
        clean: the clean values of the senders.

    Returns:
        Values and logits of all positions.
    """
    run = _FrozenRun(len(tokens), groups, receivers, clean)
    has_logits = any(receiver.what == "logits" for receiver in receivers)
    logits = model.run_with_hooks(
        tokens.repeat(1 + len(groups), 1),
        fwd_hooks=run.functions(model.cfg.n_layers),
        return_type="logits" if has_logits else None,
    )
    by_group = logits.view(1 + len(groups), *tokens.shape, -1)[1:] if has_logits else None
    return Arrived(0, run.values, by_group)


class _FrozenRun:
    """The functions on hooks of such a run, whose batch begins with the corrupted prompts."""

    def __init__(
        self,
        n_prompts: int,
        groups: Sequence[Sequence[Sender]],
        receivers: Sequence[Receiver],
        clean: Clean,
    ) -> None:
        self.values: dict[Receiver, torch.Tensor] = {}
        self._n_prompts = n_prompts
        self._groups = groups
        self._receivers = receivers
        self._clean = clean

    def functions(self, n_layers: int) -> list[tuple[str, HookFunction]]:
        """Pairs of hooks and functions, up to the last receiver."""
        last = max(receiver.layer for receiver in self._receivers)
        pairs: list[tuple[str, HookFunction]] = []
        for layer in range(min(last + 1, n_layers)):
            for component in ("q", "k", "v"):
                if any(self._at(layer, component)):
                    pairs.append((join(layer, f"attn.hook_{component}"), self._keep_heads))
            pairs.append((join(layer, "attn.hook_z"), self._freeze_heads))
            pairs.append((join(layer, "hook_mlp_out"), self._freeze_mlp))
        return pairs

    def _at(self, layer: int | None, what: str) -> list[Receiver]:
        return [receiver for receiver in self._receivers if receiver.layer == layer and receiver.what == what]

    def _runs(self, value: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """(the value in the corrupted run [prompt, ...], that in the run of each group [group, prompt, ...])."""
        runs = value.view(-1, self._n_prompts, *value.shape[1:])
        return runs[0], runs[1:]

    def _keep_heads(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        """Keep what arrives at heads."""
        _, runs = self._runs(value)
        for receiver in self._at(hook.layer(), hook.name[-1]):
            self.values[receiver] = runs[..., receiver.head, :].clone()

    def _freeze_heads(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        """Give all heads their corrupted values, and those that send their clean ones."""
        corrupted, runs = self._runs(value)
        runs[:] = corrupted
        layer = hook.layer()
        assert layer is not None
        for number, group in enumerate(self._groups):
            for sender in group:
                if sender.layer == layer and sender.head is not None:
                    runs[number, ..., sender.head, :] = self._clean.z(layer)[..., sender.head, :]

    def _freeze_mlp(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        """The same for the MLP, after keeping what it gives for what arrives."""
        corrupted, runs = self._runs(value)
        layer = hook.layer()
        assert layer is not None
        for receiver in self._at(layer, "mlp"):
            self.values[receiver] = runs.clone()
        runs[:] = corrupted
        for number, group in enumerate(self._groups):
            if Sender(layer, None) in group:
                runs[number] = self._clean.mlp(layer)

"""The losses of a model with each of several SAEs in the place of a value. What they are measured by is run once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actstore.errors import PatchError
from actstore.hooks.attached_sae import Autoencoder
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, all on one device."""

    ids: "torch.Tensor"
    """[row, position]."""
    is_read: "torch.Tensor"
    """Whether an SAE reads the value at a token, [row, position]; the value of others stays."""
    is_counted: "torch.Tensor"
    """Whether a token's losses and features count, [row, position]. Only tokens that are read can count."""


@dataclass
class Totals:
    """Sums over tokens."""

    losses: dict[str, float] = field(default_factory=dict)
    """By SAE, and ``model``, ``zero`` and ``mean`` without one."""
    divergences: dict[str, float] = field(default_factory=dict)
    """Kullback-Leibler divergences of the predictions from those of the model, by the same names."""
    n_features: dict[str, int] = field(default_factory=dict)
    """Features that are not 0, by SAE."""
    n_tokens: int = 0
    """Tokens with a loss."""
    n_predictions: int = 0
    """Tokens that count; the last of a row has a prediction, but no loss."""


class LossesWithSaes:
    """Runs a model with nothing, zeros, the mean, and each SAE in the place of a value."""

    def __init__(self, model: HookedModel, saes: Mapping[str, Autoencoder], writes: str) -> None:
        """
        Args:
            model: the model.
            saes: SAEs that say where they belong, by a name that is not ``model``, ``zero`` or ``mean``.
            writes: the hook that they write to.
        """
        self._model = model
        self._saes = saes
        self._writes = writes

    def totals(
        self, batches: Sequence[TokenBatch], on_batch: "Callable[[TokenBatch], None] | None" = None
    ) -> Totals:
        """Sums over the tokens of all batches.

        Args:
            batches: the tokens.
            on_batch: called after each batch.

        Raises:
            HookError: an SAE cannot be attached.
            PatchError: no token has a loss.
        """
        counted = [batch for batch in batches if bool(batch.is_counted[:, :-1].any())]
        if not counted:
            raise PatchError("no token has a loss; give rows of two tokens or more that are not excluded")
        mean, totals = self._mean(batches), Totals()
        for batch in counted:
            self._add(batch, mean, totals)
            if on_batch is not None:
                on_batch(batch)
        return totals

    def _mean(self, batches: Sequence[TokenBatch]) -> "torch.Tensor":
        """The mean of the value over all tokens that are read."""
        total: Any = 0
        count = 0
        for batch in batches:
            _, cache = self._model.run_with_cache(batch.ids, names_filter=self._writes, return_type=None)
            total = total + cache[self._writes][batch.is_read].double().sum(0)
            count += int(batch.is_read.sum())
        mean: torch.Tensor = total / count
        return mean

    def _add(self, batch: TokenBatch, mean: "torch.Tensor", totals: Totals) -> None:
        import torch

        def put(new: "torch.Tensor") -> Callable[..., "torch.Tensor"]:
            def replaced(value: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor":
                del hook
                return new.to(value).expand_as(value)

            return replaced

        def run(functions: Sequence[tuple[str, Any]]) -> "tuple[torch.Tensor, torch.Tensor]":
            logits, losses = self._model.run_with_hooks(
                batch.ids, fwd_hooks=functions, return_type="both", loss_per_token=True
            )
            return logits, losses

        clean, losses = run([])
        self._count("model", batch, clean, clean, losses, totals)
        for name, new in (("zero", torch.zeros_like(mean)), ("mean", mean)):
            logits, losses = run([(self._writes, put(new))])
            self._count(name, batch, clean, logits, losses, totals)
        for name, sae in self._saes.items():
            functions = self._functions(name, batch, totals)
            with self._model.saes(sae, use_error_term=not bool(batch.is_read.all())):
                logits, losses = run(functions)
            self._count(name, batch, clean, logits, losses, totals)
        totals.n_tokens += int(batch.is_counted[:, :-1].sum())
        totals.n_predictions += int(batch.is_counted.sum())

    def _functions(self, name: str, batch: TokenBatch, totals: Totals) -> list[tuple[str, Any]]:
        """What counts the features of an SAE, and keeps the value of tokens that it does not read."""

        def count(features: "torch.Tensor", /, *, hook: HookPoint) -> None:
            del hook
            active = (features.to(batch.ids.device) != 0)[batch.is_counted]
            totals.n_features[name] = totals.n_features.get(name, 0) + int(active.sum())

        def keep_unread(error: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor":
            del hook
            return error.masked_fill(batch.is_read.view(*batch.is_read.shape, *[1] * (error.ndim - 2)), 0.0)

        functions: list[tuple[str, Any]] = [(f"{self._writes}.hook_sae_acts_post", count)]
        if not bool(batch.is_read.all()):
            functions.append((f"{self._writes}.hook_sae_error", keep_unread))
        return functions

    @staticmethod
    def _count(
        name: str,
        batch: TokenBatch,
        clean: "torch.Tensor",
        logits: "torch.Tensor",
        losses: "torch.Tensor",
        totals: Totals,
    ) -> None:
        counted = losses[batch.is_counted[:, :-1]].double().sum()
        totals.losses[name] = totals.losses.get(name, 0.0) + float(counted)
        divergence = 0.0
        if logits is not clean:
            # Row by row, since logarithms of all predictions take as much memory as the logits.
            for row, is_counted in enumerate(batch.is_counted):
                divergence += _divergence(clean[row][is_counted], logits[row][is_counted])
        totals.divergences[name] = totals.divergences.get(name, 0.0) + divergence


def _divergence(clean: "torch.Tensor", logits: "torch.Tensor") -> float:
    """Sum over tokens of the Kullback-Leibler divergence of predictions from those of the model, in nats."""
    expected, found = clean.float().log_softmax(-1), logits.float().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).double().sum())

"""How much of the loss of a model stays if a sparse autoencoder stands in the place of a value."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from actstore.hooks.attached_sae import AttachedSae, Autoencoder
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import HookName
from actstore.patching.batches import batches
from actstore.patching.losses_with_saes import LossesWithSaes, TokenBatch, Totals

if TYPE_CHECKING:
    import torch

_SPECIAL: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
_ONLY: Final = "sae"


@dataclass(frozen=True)
class LossRecovered:
    """Losses of the same tokens, as means in nats."""

    hook: str
    """The hook whose value is replaced."""
    loss: float
    """Loss of the model as it is."""
    loss_with_sae: float
    """Loss with what the SAE makes of the value in its place."""
    loss_zero: float
    """Loss with zeros in its place."""
    loss_mean: float
    """Loss with the mean of the value in its place."""
    kl_with_sae: float
    """Mean Kullback-Leibler divergence of the predictions with the SAE from those of the model, in nats."""
    kl_zero: float
    """The same with zeros."""
    l0: float
    """Mean number of features of a token that are not 0."""
    n_tokens: int
    """Number of tokens with a loss."""

    @property
    def recovered(self) -> float:
        """How far the SAE brings the loss from that of zeros (0) to that of the model (1); SAELens' ``ce_loss_score``.

        NaN if zeros leave the loss as it is.
        """
        return _share(self.loss_zero, self.loss_with_sae, self.loss)

    @property
    def kl_recovered(self) -> float:
        """The same of the divergence, which the model itself has 0 of; SAELens' ``kl_div_score``."""
        return _share(self.kl_zero, self.kl_with_sae, 0.0)

    @property
    def recovered_from_mean(self) -> float:
        """The loss recovered, from the loss of the mean."""
        return _share(self.loss_mean, self.loss_with_sae, self.loss)


def loss_recovered(
    model: HookedModel,
    tokens: "torch.Tensor | str | Sequence[str]",
    sae: Autoencoder,
    hook: HookName | None = None,
    *,
    exclude: Sequence[int] | None = None,
    max_tokens: int | None = None,
) -> LossRecovered:
    """Compare the loss of a model with that of the model in which an SAE stands in the place of a value.

    Zeros and means, which it is measured by, stand at all tokens. The SAE does not read excluded tokens: their value
    stays, and their loss and features do not count. With the defaults these are the figures of SAELens' ``run_evals``.

    Args:
        model: the model.
        tokens: ids [prompt, position] without padding, or text.
        sae: an SAE or transcoder of SAELens, or any object with ``encode`` and ``decode``.
        hook: the hook that it reads and replaces; None for what ``sae.cfg`` says.
        exclude: ids of tokens that the SAE does not read; None for BOS, EOS, padding and separator of the tokenizer.
        max_tokens: tokens of one forward, at least one prompt; None for 4,096.

    Raises:
        HookError: the model does not have the hook, or the object is no SAE that can be attached.
        PatchError: no token has a loss.
    """
    special = _special(model) if exclude is None else list(exclude)
    given: Any = sae if hook is None else At(sae, model.names.one(hook))
    writes = AttachedSae(given, model.names).writes
    every = [_without(ids, special) for ids in batches(model, tokens, max_tokens) if ids.shape[1] > 1]
    totals = LossesWithSaes(model, {_ONLY: given}, writes).totals(every)
    return recovered_of(totals, _ONLY, writes)


def recovered_of(totals: Totals, name: str, writes: str) -> LossRecovered:
    """The figures of the SAE of this name."""
    losses = {one: value / totals.n_tokens for one, value in totals.losses.items()}
    divergences = {one: value / totals.n_predictions for one, value in totals.divergences.items()}
    return LossRecovered(
        hook=writes,
        loss=losses["model"],
        loss_with_sae=losses[name],
        loss_zero=losses["zero"],
        loss_mean=losses["mean"],
        kl_with_sae=divergences[name],
        kl_zero=divergences["zero"],
        l0=totals.n_features[name] / totals.n_predictions,
        n_tokens=totals.n_tokens,
    )


def _without(ids: "torch.Tensor", special: Sequence[int]) -> TokenBatch:
    """Tokens of which the excluded ones are neither read nor counted."""
    import torch

    is_read = ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device))
    return TokenBatch(ids, is_read, is_read)


class At:
    """An SAE at a hook that its configuration does not name."""

    def __init__(self, sae: Any, hook: str) -> None:
        self._sae = sae
        d_in = getattr(getattr(sae, "cfg", None), "d_in", None)
        self.cfg = SimpleNamespace(hook_name=hook, d_in=d_in)

    def __repr__(self) -> str:
        return repr(self._sae)

    def __getattr__(self, name: str) -> Any:
        # Called only for attributes that are not found otherwise.
        return getattr(self._sae, name)


def _special(model: HookedModel) -> list[int]:
    if not model.has_tokenizer:
        return []
    numbers = (getattr(model.tokenizer, name, None) for name in _SPECIAL)
    return sorted({number for number in numbers if number is not None})


def _share(ablated: float, with_sae: float, loss: float) -> float:
    return (ablated - with_sae) / (ablated - loss) if ablated != loss else float("nan")

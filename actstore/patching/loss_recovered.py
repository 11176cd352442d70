"""How much of the loss of a model stays if a sparse autoencoder stands in the place of a value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import PatchError
from actstore.hooks.attached_sae import AttachedSae, Autoencoder
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import HookName
from actstore.patching.batches import batches

if TYPE_CHECKING:
    import torch

_SPECIAL: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")


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
    def recovered_from_mean(self) -> float:
        """The same, from the loss of the mean."""
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
    given: Any = sae if hook is None else _At(sae, model.names.one(hook))
    writes = AttachedSae(given, model.names).writes
    task = _Task(model, given, writes, special)
    every = [ids for ids in batches(model, tokens, max_tokens) if ids.shape[1] > 1]
    mean = task.mean(every)
    totals = _Totals()
    for ids in every:
        task.add(ids, mean, totals)
    if not totals.n_tokens:
        raise PatchError("no token has a loss; give rows of two tokens or more that are not excluded")
    losses = {name: value / totals.n_tokens for name, value in totals.losses.items()}
    return LossRecovered(
        writes,
        losses["model"],
        losses["sae"],
        losses["zero"],
        losses["mean"],
        totals.n_features / totals.n_encoded,
        totals.n_tokens,
    )


@dataclass
class _Totals:
    """Sums over tokens."""

    losses: dict[str, float] = field(default_factory=dict)
    n_tokens: int = 0
    n_features: int = 0
    n_encoded: int = 0


class _Task:
    """One SAE at one hook."""

    def __init__(self, model: HookedModel, sae: Autoencoder, writes: str, special: Sequence[int]) -> None:
        self._model = model
        self._sae = sae
        self._writes = writes
        self._special = special

    def mean(self, every: "Sequence[torch.Tensor]") -> "torch.Tensor | None":
        """The mean of the value over all tokens that the SAE reads; None if there are none."""
        total: torch.Tensor | None = None
        count = 0
        for ids in every:
            is_read = self._is_read(ids)
            _, cache = self._model.run_with_cache(ids, names_filter=self._writes, return_type=None)
            part = cache[self._writes][is_read].double().sum(0)
            total = part if total is None else total + part
            count += int(is_read.sum())
        return None if total is None or not count else total / count

    def add(self, ids: "torch.Tensor", mean: "torch.Tensor | None", totals: _Totals) -> None:
        """Add the losses and features of a batch."""
        import torch

        is_read = self._is_read(ids)
        if mean is None or not bool(is_read[:, :-1].any()):
            return

        def put(new: "torch.Tensor") -> Callable[..., "torch.Tensor"]:
            def replaced(value: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor":
                del hook
                return new.to(value).expand_as(value)

            return replaced

        def run(functions: Sequence[tuple[str, Any]]) -> "torch.Tensor":
            losses: torch.Tensor = self._model.run_with_hooks(
                ids, fwd_hooks=functions, return_type="loss", loss_per_token=True
            )
            return losses

        def count(features: "torch.Tensor", /, *, hook: HookPoint) -> None:
            del hook
            totals.n_features += int((features.to(ids.device) != 0)[is_read].sum())

        def keep_unread(error: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor":
            del hook
            return error.masked_fill(is_read.view(*is_read.shape, *[1] * (error.ndim - 2)), 0.0)

        is_whole = bool(is_read.all())
        functions: list[tuple[str, Any]] = [(f"{self._writes}.hook_sae_acts_post", count)]
        if not is_whole:
            functions.append((f"{self._writes}.hook_sae_error", keep_unread))
        with self._model.saes(self._sae, use_error_term=not is_whole):
            with_sae = run(functions)
        losses: Mapping[str, torch.Tensor] = {
            "model": run([]),
            "sae": with_sae,
            "zero": run([(self._writes, put(torch.zeros_like(mean)))]),
            "mean": run([(self._writes, put(mean))]),
        }
        for name, values in losses.items():
            totals.losses[name] = totals.losses.get(name, 0.0) + float(values[is_read[:, :-1]].double().sum())
        totals.n_tokens += int(is_read[:, :-1].sum())
        totals.n_encoded += int(is_read.sum())

    def _is_read(self, ids: "torch.Tensor") -> "torch.Tensor":
        """Whether each token is read by the SAE [row, position]."""
        import torch

        return ~torch.isin(ids, torch.tensor(self._special, dtype=ids.dtype, device=ids.device))


class _At:
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

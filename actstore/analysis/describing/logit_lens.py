"""The tokens that directions of the residual stream make more and less likely."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.describing.ranking import largest
from actstore.errors import JobError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from actstore.hooks.model import HookedModel

_BLOCK: Final = 1 << 24
"""Logits that are computed together."""


@dataclass(frozen=True)
class LogitLens:
    """The tokens that each direction adds most to the logits of, and takes most from."""

    top_tokens: NDArray[np.int64]
    """Token ids with the largest logits, largest first, [n_directions, k]."""
    top_logits: NDArray[np.float32]
    """[n_directions, k]."""
    bottom_tokens: NDArray[np.int64]
    """Token ids with the smallest logits, smallest first, [n_directions, k]."""
    bottom_logits: NDArray[np.float32]
    """[n_directions, k]."""
    tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.top_tokens)

    def text(self, direction: int, *, bottom: bool = False) -> list[str]:
        """The texts of the tokens of a direction.

        Args:
            direction: its number.
            bottom: those with the smallest logits.

        Raises:
            JobError: no model or tokenizer was given.
        """
        if self.tokenizer is None:
            raise JobError("the texts of tokens are not known; give a model, or tokenizer=, to logit_lens")
        ids = (self.bottom_tokens if bottom else self.top_tokens)[direction]
        return [str(self.tokenizer.decode([token])) for token in ids.tolist()]


def logit_lens(
    of: Any,
    model: "HookedModel | torch.Tensor | NDArray[Any]",
    k: int = 10,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> LogitLens:
    """What directions of the residual stream add to the logits of tokens, by the output embedding alone.

    With a model, its final norm is taken into account as far as it is linear: LayerNorm takes the mean off a direction,
    and the gain multiplies it. What the norm divides by depends on the rest of the stream, so logits are those of a
    stream whose scale is 1: their order, and their ratios within one direction, are right for any. Biases, the same for
    all directions, and a cap of logits, which keeps their order, are left out.

    Args:
        of: directions [n, d_model] or one [d_model]; or an SAE of SAELens or dictionary_learning, for the directions of
            its decoder.
        model: the model, or its ``W_U`` [d_model, n_tokens], which is used as it is: multiply it with the gain of the
            final norm, ``model.ln_final.w[:, None] * model.W_U``, to get what the model gives.
        k: tokens on either side.
        tokenizer: gives the texts of tokens where ``model`` is an array.

    Raises:
        JobError: an argument is not valid, or does not fit the others.
        ModelError: the model has no output embedding.
    """
    import torch

    unembedding, is_centred = _unembedding(model)
    directions = _directions(of).to(unembedding.device)
    if directions.ndim != 2 or directions.shape[1] != len(unembedding) or not directions.numel():
        raise JobError(
            f"directions are {list(directions.shape)}, and the output embedding is of a stream of {len(unembedding)}; "
            f"give directions [n, {len(unembedding)}] of the residual stream"
        )
    n_tokens = unembedding.shape[1]
    if not 1 <= k <= n_tokens:
        raise JobError(f"k is {k}; it must be 1 to {n_tokens}, the number of tokens")
    if is_centred:
        directions = directions - directions.mean(1, keepdim=True)
    step = max(1, _BLOCK // n_tokens)
    found: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(directions), step):
        logits = (directions[start : start + step] @ unembedding).cpu()
        if not logits.isfinite().all():
            raise JobError(
                "a direction, or the output embedding, holds NaN or infinity; leave such directions out"
            )
        (top, top_ids), (bottom, bottom_ids) = largest(logits, k), largest(-logits, k)
        found.append((top_ids, top, bottom_ids, -bottom))
    joined = [torch.cat(parts).numpy() for parts in zip(*found, strict=True)]
    known = tokenizer or getattr(model, "tokenizer", None)
    return LogitLens(joined[0], joined[1], joined[2], joined[3], known)


def _unembedding(model: Any) -> "tuple[torch.Tensor, bool]":
    """The output embedding [d_model, n_tokens] with the gain of the final norm, and whether that takes the mean off."""
    import torch

    if not hasattr(model, "W_U"):
        given = model if isinstance(model, torch.Tensor) else torch.from_numpy(np.asarray(model))
        if given.ndim != 2 or not given.is_floating_point():
            raise JobError(
                f"model is {given.dtype} of shape {list(given.shape)}; give a HookedModel, or W_U [d_model, n_tokens]"
            )
        return given.detach().float(), False
    # The norm of a TransformerLens model whose gain is folded into W_U has none.
    try:
        gain = getattr(model.ln_final, "w", None)
    except ModelError:  # a model without a final norm
        gain = None
    unembedding = model.W_U.detach().float()
    if gain is not None:
        unembedding = gain.detach().float()[:, None] * unembedding
    return unembedding, (model.cfg.normalization_type or "").startswith("LN")


def _directions(of: Any) -> "torch.Tensor":
    """Directions [n, d] in float32."""
    import torch

    if hasattr(of, "W_dec"):
        of = of.W_dec
    elif hasattr(of, "decoder") and hasattr(of.decoder, "weight"):
        of = of.decoder.weight.T  # dictionary_learning: a linear layer
    if isinstance(of, torch.Tensor):
        values = of.detach()
    else:
        array = np.asarray(of)
        if array.dtype.kind not in "fiu":
            raise JobError(
                f"directions are {array.dtype} of shape {array.shape}; give numbers [n, d_model], or an SAE"
            )
        values = torch.from_numpy(array)
    values = values.float()
    return values[None] if values.ndim == 1 else values

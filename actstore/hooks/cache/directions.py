"""Turning tokens into ids of a model, and into directions of its residual stream."""

from typing import TYPE_CHECKING, Any

from actstore.errors import TokensError
from actstore.hooks.loaded_model import LoadedModel
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch


def token_ids(model: LoadedModel, tokens: Any) -> "torch.Tensor":
    """The ids of one or several tokens, each given as text or id.

    Raises:
        TokensError: a text is not one token, or an id is not of this model.
    """
    import torch

    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    elif isinstance(tokens, list | tuple) and any(isinstance(token, str) for token in tokens):
        tokens = [model.to_single_token(token) if isinstance(token, str) else token for token in tokens]
    try:
        ids = torch.as_tensor(tokens)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise TokensError(f"expected token ids or texts, found {quoted(tokens)}") from error
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool or ids.numel() == 0:
        raise TokensError(f"expected token ids or texts, found {ids.dtype} of shape {list(ids.shape)}")
    wrong = ids[(ids < 0) | (ids >= model.cfg.d_vocab)]
    if wrong.numel():
        raise TokensError(f"token id {int(wrong[0])} is outside of the {model.cfg.d_vocab} ids of this model")
    return ids.long()


def residual_directions(model: LoadedModel, tokens: Any) -> "torch.Tensor":
    """The columns of W_U of tokens [..., d_model], with the axes of the tokens in front.

    Raises:
        ModelError: the model was loaded without its head.
        TokensError: a text is not one token, or an id is not of this model.
    """
    weight = model.weights.W_U
    ids = token_ids(model, tokens).to(weight.device)
    return weight[:, ids.flatten()].T.reshape(*ids.shape, -1)

"""Residual streams as users give them, checked before anything is computed."""

from typing import TYPE_CHECKING, Any

from actstore.errors import HookError, TokensError
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch


def as_residual(given: Any, d_model: int, n_ctx: int | None) -> "torch.Tensor":
    """A residual stream [batch, position, d_model].

    Raises:
        HookError: it is none.
        TokensError: rows are longer than ``n_ctx``.
    """
    import torch

    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        raise HookError(
            f"with start_at_layer the input is the residual stream [batch, position, {d_model}], found {quoted(given)}"
        )
    if given.ndim != 3 or given.shape[-1] != d_model or not given.numel():
        raise HookError(
            f"the residual stream has shape {list(given.shape)}; give [batch, position, {d_model}]"
        )
    if n_ctx is not None and given.shape[1] > n_ctx:
        raise TokensError(
            f"rows of {given.shape[1]} positions are longer than the {n_ctx} this model is made for"
        )
    return given

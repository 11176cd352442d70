"""Norms of the model, applied to parts of the residual stream."""

from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.cache.cached_values import CachedValues, check_computes, needed_model
from actstore.hooks.cache.derived import together
from actstore.hooks.cache.position import PositionSlice, at_positions
from actstore.hooks.cache.stream_names import Place, scale_hook
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.weights.used_weights import placed_for

if TYPE_CHECKING:
    import torch


def parts_after_norm(
    cache: CachedValues,
    stack: "torch.Tensor",
    place: Place,
    pos_slice: PositionSlice = None,
    batch_slice: PositionSlice = None,
    has_batch_dim: bool = True,
) -> "torch.Tensor":
    """Parts of a stream after the norm at a place, which still add up: ``ActivationCache.apply_ln_to_stack``.

    Args:
        cache: values from which the scale of the norm follows.
        stack: [part, batch, position, d_model] at the chosen positions; or one part without its axis.
        place: where the norm reads the stream.
        pos_slice: positions of the stack.
        batch_slice: rows to choose from the stack.
        has_batch_dim: whether the stack has a batch axis.

    Raises:
        HookError: the scale is missing, or the stack does not fit it; or the values may not be activations.
        ModelError: there is no model.
    """
    check_computes(cache, "apply_ln_to_stack")
    scale = at_positions(cache[scale_hook(cache.names, cache.cfg, place)], pos_slice, axis=-2)
    if batch_slice is not None:
        if has_batch_dim:
            axis = 0 if stack.shape[:-1] == scale.shape[:-1] else 1
            stack = at_positions(stack, batch_slice, axis=axis, noun="row")
        if cache.has_batch_dim:
            scale = at_positions(scale, batch_slice, axis=0, noun="row")
    _check_fits(stack, scale, cache.has_batch_dim)
    stack = centred(stack, cache.cfg)
    factor = gain(cache, place, stack) / scale.to(stack.device).float()
    return stack * factor.to(stack.dtype)


def centred(stream: "torch.Tensor", cfg: HookedConfig) -> "torch.Tensor":
    """Streams minus their mean if norms of this model are LayerNorms."""
    if cfg.normalization_type == "LN":
        return stream - stream.mean(-1, keepdim=True)
    return stream


def gain(cache: CachedValues, place: Place, stack: "torch.Tensor") -> "torch.Tensor":
    """The gain of the norm at a place, float32 [d_model], on the device of a stack.

    Raises:
        ModelError: there is no model.
    """
    weights = needed_model(cache, "apply_ln_to_stack, which applies the gain of a norm,").weights
    if place.layer == cache.cfg.n_layers:
        norm = weights.ln_final
    else:
        block = weights.blocks[place.layer]
        norm = block.ln2 if place.mlp_input else block.ln1
    return together(stack, norm.w)[1].float()


def after_final_norm(cache: CachedValues, what: str, stream: "torch.Tensor") -> "torch.Tensor":
    """Streams after the final norm, as the module of the model computes it: each with its own scale, gain and bias.

    Args:
        cache: a cache with a model.
        what: what needs the norm, for an error.
        stream: the streams [..., d_model].

    Raises:
        HookError: the model has no final norm.
        ModelError: there is no model.
    """
    cache.names.one("ln_final.hook_normalized")
    model = needed_model(cache, what)
    assert model.architecture.ln_final is not None
    return through_module(model.base.get_submodule(model.architecture.ln_final), stream)


def through_module(module: Any, value: "torch.Tensor") -> "torch.Tensor":
    """The output of a module of the model for a value, on the device of the value."""
    import torch

    # Parameters of a model that was loaded elsewhere require gradients; the value decides.
    with torch.set_grad_enabled(torch.is_grad_enabled() and value.requires_grad):
        result: torch.Tensor = module(placed_for(module, value))
    return result.to(value.device)


def _check_fits(stack: "torch.Tensor", scale: "torch.Tensor", has_batch_dim: bool) -> None:
    """Refuse a stack of other rows or positions than the scale has, whose first axis is the row if it has that axis."""
    is_part = stack.shape[:-1] == scale.shape[:-1]
    rows, scales = stack.shape[0 if is_part else 1 : -1], scale.shape[:-1]
    fits = rows == scales or (has_batch_dim and scales[:1] == (1,) and rows == scales[1:])
    if not fits and (has_batch_dim or rows[1:] != scales):
        raise HookError(
            f"the stack has shape {tuple(stack.shape)} and the scale of its norm {tuple(scale.shape)}; "
            "give the pos_slice and the batch_slice here with which the stack was made"
        )

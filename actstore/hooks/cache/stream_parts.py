"""Stacks of streams, and of parts of them that add up to the stream."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actstore.errors import HookError
from actstore.hooks.cache.cached_values import CachedValues, check_computes, needed_model, require
from actstore.hooks.cache.norms import after_final_norm, parts_after_norm
from actstore.hooks.cache.position import PositionSlice, at_positions
from actstore.hooks.cache.projection import projected
from actstore.hooks.cache.stream_names import Place, scale_hook, stream_hooks, stream_into

if TYPE_CHECKING:
    import torch

    from actstore.hooks.weights.model_weights import Weights


def accumulated_streams(
    cache: CachedValues, place: Place, incl_mid: bool, apply_ln: bool, pos_slice: PositionSlice
) -> "tuple[torch.Tensor, list[str]]":
    """The stream into each layer up to a place, and its label: ``ActivationCache.accumulated_resid``."""
    parts = stream_hooks(cache.names, cache.cfg, place, incl_mid)
    names = [name for _, name in parts]
    is_final = place.layer == cache.cfg.n_layers
    norm = place if apply_ln and not is_final else None
    stack = stack_of_hooks(cache, "accumulated_resid", names, pos_slice, norm)
    if apply_ln and is_final:
        check_computes(cache, "accumulated_resid with apply_ln")
        stack = after_final_norm(cache, "accumulated_resid with apply_ln", stack)
    return stack, [label for label, _ in parts]


def stack_of_hooks(
    cache: CachedValues,
    what: str,
    names: Sequence[str],
    pos_slice: PositionSlice,
    norm: Place | None = None,
) -> "torch.Tensor":
    """The streams of some hooks in one tensor [hook, batch, position, d_model].

    Args:
        cache: the values.
        what: what needs them, for an error.
        names: the hooks.
        pos_slice: positions.
        norm: the place of the norm to apply, if any.

    Raises:
        HookError: values are missing.
        ModelError: there is a norm and no model.
    """
    import torch

    scales = [] if norm is None else [scale_hook(cache.names, cache.cfg, norm)]
    require(cache, what, [*names, *scales])
    stack = torch.stack([at_positions(cache[name], pos_slice, axis=-2) for name in names])
    return stack if norm is None else parts_after_norm(cache, stack, norm, pos_slice)


def writing_weights(cache: CachedValues, what: str, parts: str) -> "Weights":
    """The weights of a model whose heads and neurons write to the residual stream.

    Args:
        cache: a cache with a model.
        what: what needs them, for an error.
        parts: ``heads`` or ``neurons``, for an error.

    Raises:
        HookError: a norm comes between them and the stream.
        ModelError: there is no model.
    """
    model = needed_model(cache, what)
    if model.architecture.ln1_post is not None:
        raise HookError(
            f"{what} is not offered for {cache.cfg.model_type}: its {parts} do not write to the residual stream "
            "themselves, a norm acts on their sum before it is added; use decompose_resid"
        )
    return model.weights


def hooks_beside_parts(cache: CachedValues, layer: int, incl_remainder: bool, apply_ln: bool) -> list[str]:
    """The hooks whose values `joined_parts` needs besides the parts."""
    streams = [stream_into(layer)] if incl_remainder or layer == 0 else []
    return [*streams, *([scale_hook(cache.names, cache.cfg, Place(layer))] if apply_ln else [])]


def joined_parts(
    cache: CachedValues,
    parts: "Sequence[torch.Tensor]",
    labels: Sequence[str],
    layer: int,
    incl_remainder: bool,
    pos_slice: PositionSlice,
    apply_ln: bool,
    onto: "torch.Tensor | None" = None,
) -> "tuple[torch.Tensor, list[str]]":
    """Parts of the stream into a layer in one stack, and their labels.

    Args:
        cache: the values.
        parts: stacks of parts, each [part, batch, position, d_model]; after the norm and as products with ``onto`` if
            that is given. Before layer 0 there are none.
        labels: a label for each part.
        layer: the layer; the number of layers for the unembedding.
        incl_remainder: add a part ``remainder``, which is the stream minus all parts.
        pos_slice: positions of the parts.
        apply_ln: apply the norm before the layer.
        onto: directions with which the parts were multiplied.

    Raises:
        HookError: values are missing.
        ModelError: there is a norm and no model.
    """
    import torch

    labels, norm = list(labels), Place(layer) if apply_ln else None
    if incl_remainder or not parts:
        whole = at_positions(cache[stream_into(layer)], pos_slice, axis=-2)[None]
        if onto is not None:
            whole = onto_directions(cache, whole, norm, pos_slice, onto)
        # Before layer 0 there are no parts: the stack is empty, or all of it is the remainder.
        parts = parts or [whole[:0]]
        if incl_remainder:
            sums = torch.stack([part.sum(0) for part in parts]).sum(0)
            parts, labels = [*parts, whole - sums], [*labels, "remainder"]
    stack = torch.cat(list(parts))
    if norm is not None and onto is None:
        stack = parts_after_norm(cache, stack, norm, pos_slice)
    return stack, labels


def onto_directions(
    cache: CachedValues,
    stack: "torch.Tensor",
    norm: Place | None,
    pos_slice: PositionSlice,
    onto: "torch.Tensor",
) -> "torch.Tensor":
    """The products of parts with directions, after the norm at a place if one is given."""
    if norm is not None:
        stack = parts_after_norm(cache, stack, norm, pos_slice)
    return projected(stack, onto)

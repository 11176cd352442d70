"""What heads add to the residual stream."""

from typing import TYPE_CHECKING

from actstore.hooks.cache.cached_values import CachedValues, check_computes, require
from actstore.hooks.cache.derived import head_results, together
from actstore.hooks.cache.position import PositionSlice, at_positions
from actstore.hooks.cache.stream_parts import hooks_beside_parts, joined_parts, writing_weights
from actstore.hooks.naming.names import join

if TYPE_CHECKING:
    import torch

    from actstore.hooks.weights.model_weights import Weights


def stack_of_heads(
    cache: CachedValues,
    layer: int,
    incl_remainder: bool,
    pos_slice: PositionSlice,
    apply_ln: bool,
    fold_value_biases: bool,
) -> "tuple[torch.Tensor, list[str]]":
    """What each head before a layer adds to the stream, and its label: ``ActivationCache.stack_head_results``."""
    weights = writing_weights(cache, "stack_head_results", "heads")
    if incl_remainder:
        check_computes(cache, "stack_head_results with incl_remainder")
    if fold_value_biases:
        check_computes(cache, "stack_head_results with fold_value_biases")
    names = [join(index, "attn.hook_result") for index in range(layer)]
    others = hooks_beside_parts(cache, layer, incl_remainder, apply_ln)
    require(cache, "stack_head_results", [*names, *others])
    parts = [heads_of_layer(cache, weights, index, pos_slice, fold_value_biases) for index in range(layer)]
    labels = [label for index in range(layer) for label in head_labels(cache, index)]
    return joined_parts(cache, parts, labels, layer, incl_remainder, pos_slice, apply_ln)


def heads_of_layer(
    cache: CachedValues, weights: "Weights", layer: int, pos_slice: PositionSlice, fold_value_biases: bool
) -> "torch.Tensor":
    """What each head of a layer adds to the stream [head, batch, position, d_model].

    Args:
        cache: values of ``attn.hook_result`` or ``attn.hook_z``.
        weights: weights of the model.
        layer: the layer.
        pos_slice: positions.
        fold_value_biases: leave out what biases of values, and of the norm before them, add.

    Raises:
        HookError: values are missing.
    """
    name = join(layer, "attn.hook_result")
    if name in cache.cache_dict:
        results = at_positions(cache.cache_dict[name], pos_slice, axis=-3)
    else:
        z = at_positions(cache[join(layer, "attn.hook_z")], pos_slice, axis=-3)
        results = head_results(z, weights.blocks[layer].attn.W_O)
    if fold_value_biases:
        results, biases = together(results, weights.blocks[layer].attn.written_biases)
        results = results - biases
    return results.movedim(-2, 0)


def head_labels(cache: CachedValues, layer: int) -> list[str]:
    """``L0H0``, ``L0H1``, ... of the heads of a layer."""
    return [f"L{layer}H{head}" for head in range(cache.cfg.n_heads)]

"""What neurons add to the residual stream."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from actstore.hooks.cache.cached_values import CachedValues, check_computes, require
from actstore.hooks.cache.derived import together
from actstore.hooks.cache.norms import centred, gain
from actstore.hooks.cache.position import PositionSlice, at_positions, indices, is_one
from actstore.hooks.cache.projection import check_directions, projected
from actstore.hooks.cache.stream_names import Place, scale_hook
from actstore.hooks.cache.stream_parts import hooks_beside_parts, joined_parts, writing_weights
from actstore.hooks.naming.names import join

if TYPE_CHECKING:
    import torch


def stack_of_neurons(
    cache: CachedValues,
    layer: int,
    pos_slice: PositionSlice,
    neuron_slice: PositionSlice,
    incl_remainder: bool,
    apply_ln: bool,
    onto: "torch.Tensor | None",
) -> "tuple[torch.Tensor, list[str]]":
    """What each neuron before a layer adds to the stream, and its label: ``ActivationCache.stack_neuron_results``."""
    weights = writing_weights(cache, "stack_neuron_results", "neurons")
    names = [cache.names.one(join(index, "mlp.hook_post")) for index in range(layer)]
    others = hooks_beside_parts(cache, layer, incl_remainder, apply_ln)
    require(cache, "stack_neuron_results", [*names, *others])
    norm = Place(layer) if apply_ln and onto is not None else None
    parts: list[torch.Tensor] = []
    labels: list[str] = []
    for index in range(layer):
        chosen = indices(neuron_slice, weights.blocks[index].mlp.W_out.shape[0], "neuron")
        results = neurons_of_layer(cache, index, chosen, pos_slice, onto, norm)
        parts.append(neurons_in_front(results, onto))
        labels += neuron_labels(index, chosen)
    return joined_parts(cache, parts, labels, layer, incl_remainder, pos_slice, apply_ln, onto)


def neurons_of_layer(
    cache: CachedValues,
    layer: int,
    neuron_slice: PositionSlice,
    pos_slice: PositionSlice,
    onto: "torch.Tensor | None",
    norm: Place | None = None,
) -> "torch.Tensor":
    """What each neuron of a layer adds to the stream: ``ActivationCache.get_neuron_results``.

    Args:
        cache: values of ``mlp.hook_post``.
        layer: 0 to the last, or -1 for the last.
        neuron_slice: neurons; an integer removes their axis.
        pos_slice: positions.
        onto: directions with which each result is multiplied; None for the results themselves.
        norm: the place of a norm to apply before; it needs directions.

    Returns:
        [batch, position, neuron, d_model]; [batch, position, neuron] for one direction [d_model], and
        [batch, position, neuron, n] for several [d_model, n].

    Raises:
        HookError: values are missing, or neurons of this layer do not write to the stream.
        ModelError: there is no model.
    """
    check_directions(onto, cache.cfg.d_model)
    check_computes(cache, "get_neuron_results")
    name = cache.names.one(("post", layer))
    weights = writing_weights(cache, "get_neuron_results", "neurons")
    require(cache, "get_neuron_results", [name])
    post = at_positions(cache[name], pos_slice, axis=-2)
    index = int(name.split(".")[1])
    post, weight = together(post, weights.blocks[index].mlp.W_out)
    if neuron_slice is not None:
        chosen = indices(neuron_slice, weight.shape[0], "neuron")
        post, weight = post[..., chosen], weight[chosen]
    scale: torch.Tensor | None = None
    if norm is not None:
        # A norm with the scale of the whole stream is linear: its centring and gain act on the weights.
        scale = at_positions(cache[scale_hook(cache.names, cache.cfg, norm)], pos_slice, axis=-2).to(post)
        weight = centred(weight.float(), cache.cfg) * gain(cache, norm, weight)
    weight = projected(weight, onto).to(post.dtype)
    results = post * weight if weight.ndim == 1 else post[..., None] * weight
    if scale is not None:
        results = results / (scale if weight.ndim == 1 else scale[..., None])
    return results.select(post.ndim - 1, 0) if is_one(neuron_slice) else results


def neurons_in_front(results: "torch.Tensor", onto: "torch.Tensor | None") -> "torch.Tensor":
    """Results with the axis of neurons in front: it is the last but one, or the last of products with one direction."""
    return results.movedim(-1 if onto is not None and onto.ndim == 1 else -2, 0)


def neuron_labels(layer: int, neurons: Iterable[int]) -> list[str]:
    """``L0N0``, ``L0N1``, ... of some neurons of a layer."""
    return [f"L{layer}N{neuron}" for neuron in neurons]

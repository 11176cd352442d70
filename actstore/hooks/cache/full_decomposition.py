"""All parts of the residual stream: heads, neurons, embeddings and biases."""

from typing import TYPE_CHECKING

from actstore.hooks.cache.cached_values import CachedValues, require
from actstore.hooks.cache.heads import head_labels, heads_of_layer
from actstore.hooks.cache.neurons import neuron_labels, neurons_in_front, neurons_of_layer
from actstore.hooks.cache.norms import parts_after_norm
from actstore.hooks.cache.position import PositionSlice
from actstore.hooks.cache.projection import check_directions
from actstore.hooks.cache.stream_names import Place, embedding_hooks, scale_hook
from actstore.hooks.cache.stream_parts import onto_directions, stack_of_hooks, writing_weights
from actstore.hooks.naming.names import join

if TYPE_CHECKING:
    import torch


def all_parts(
    cache: CachedValues,
    place: Place,
    expand_neurons: bool,
    apply_ln: bool,
    pos_slice: PositionSlice,
    onto: "torch.Tensor | None",
    fold_value_biases: bool,
) -> "tuple[torch.Tensor, list[str]]":
    """All parts of the stream at a place, and their labels: ``ActivationCache.get_full_resid_decomposition``."""
    import torch

    what = "get_full_resid_decomposition"
    weights = writing_weights(cache, what, "heads")
    layers = range(place.layer)
    layers_of_heads = range(place.layer + place.mlp_input)
    mlp = "mlp.hook_post" if expand_neurons else "hook_mlp_out"
    mlps = [cache.names.one(join(index, mlp)) for index in layers]
    heads = [join(index, "attn.hook_result") for index in layers_of_heads]
    embeddings = embedding_hooks(cache.names)
    scales = [scale_hook(cache.names, cache.cfg, place)] if apply_ln else []
    require(cache, what, [*heads, *mlps, *(name for _, name in embeddings), *scales])
    check_directions(onto, cache.cfg.d_model)
    norm = place if apply_ln else None

    def finished(part: torch.Tensor) -> torch.Tensor:
        return part if onto is None else onto_directions(cache, part, norm, pos_slice, onto)

    parts: list[torch.Tensor] = []
    labels: list[str] = []
    for index in layers_of_heads:
        parts.append(finished(heads_of_layer(cache, weights, index, pos_slice, fold_value_biases)))
        labels += head_labels(cache, index)
    if expand_neurons:
        # With directions, the norm acts on the weights of neurons, which takes little memory.
        norm_of_neurons = None if onto is None else norm
        for index in layers:
            results = neurons_of_layer(cache, index, None, pos_slice, onto, norm_of_neurons)
            parts.append(neurons_in_front(results, onto))
            labels += neuron_labels(index, range(len(parts[-1])))
    elif mlps:
        parts.append(finished(stack_of_hooks(cache, what, mlps, pos_slice)))
        labels += [f"{index}_mlp_out" for index in layers]
    embedded = stack_of_hooks(cache, what, [name for _, name in embeddings], pos_slice)
    bias = weights.accumulated_bias(
        *place, include_mlp_biases=expand_neurons, fold_value_biases=fold_value_biases
    )
    parts += [finished(embedded), finished(bias.detach().to(embedded).expand_as(embedded[:1]))]
    labels += [*(label for label, _ in embeddings), "bias"]
    stack = torch.cat(parts)
    if norm is not None and onto is None:
        stack = parts_after_norm(cache, stack, norm, pos_slice)
    return stack, labels

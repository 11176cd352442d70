"""What parts of the residual stream say about logits."""

from typing import TYPE_CHECKING, Any

from actstore.errors import HookError, ModelError
from actstore.hooks.cache.cached_values import CachedValues, check_computes, needed_model
from actstore.hooks.cache.derived import together
from actstore.hooks.cache.directions import residual_directions, token_ids
from actstore.hooks.cache.norms import after_final_norm, parts_after_norm, through_module
from actstore.hooks.cache.position import PositionSlice
from actstore.hooks.cache.stream_names import Place, place_before
from actstore.hooks.cache.stream_parts import accumulated_streams
from actstore.hooks.loaded_model import LoadedModel

if TYPE_CHECKING:
    import torch


def logit_attributions(
    cache: CachedValues,
    stack: "torch.Tensor",
    tokens: Any,
    incorrect_tokens: Any,
    pos_slice: PositionSlice,
    batch_slice: PositionSlice,
    has_batch_dim: bool,
) -> "torch.Tensor":
    """What each part of the stream adds to the logits of tokens: ``ActivationCache.logit_attrs``."""
    import torch

    model = needed_model(cache, "logit_attrs")
    wide = torch.promote_types(stack.dtype, torch.float32)
    unembedding = Place(cache.cfg.n_layers)
    scaled = parts_after_norm(cache, stack.to(wide), unembedding, pos_slice, batch_slice, has_batch_dim)
    directions = _directions(model, tokens, scaled)
    if incorrect_tokens is not None:
        directions = directions - _directions(model, incorrect_tokens, scaled)
    return (scaled * directions).sum(-1)


def logits_of_streams(
    cache: CachedValues, layer: int | None, incl_mid: bool, pos_slice: PositionSlice
) -> "tuple[torch.Tensor, list[str]]":
    """The logits of the stream into each layer, and its label: ``ActivationCache.logit_lens``."""
    import torch

    check_computes(cache, "logit_lens")
    model = needed_model(cache, "logit_lens")
    if not model.has_head:
        raise ModelError("logit_lens needs the language-model head; load the model with it")
    place = place_before(cache.names, cache.cfg, layer)
    streams, labels = accumulated_streams(cache, place, incl_mid, False, pos_slice)
    head = model.hf.get_output_embeddings()
    logits = torch.stack(
        [through_module(head, after_final_norm(cache, "logit_lens", stream)) for stream in streams]
    )
    cap = cache.cfg.output_logits_soft_cap
    return logits if cap is None else (logits / cap).tanh() * cap, labels


def _directions(model: LoadedModel, tokens: Any, stack: "torch.Tensor") -> "torch.Tensor":
    """The directions of tokens in a shape that can be multiplied with a stack [part, ..., d_model]."""
    ids = token_ids(model, tokens)
    rows = stack.shape[1:-1]
    if ids.ndim and ids.shape not in (rows, rows[:1]):
        raise HookError(
            f"tokens have shape {list(ids.shape)} and the stack has rows and positions {list(rows)}; give one "
            "token, one for each row, or one for each row and position"
        )
    directions = together(stack, residual_directions(model, ids))[1]
    if ids.ndim == 1:
        directions = directions.reshape(len(ids), *[1] * (len(rows) - 1), -1)
    return directions

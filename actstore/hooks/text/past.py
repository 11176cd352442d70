"""Caches of keys and values as users give them, with the padding of the positions in them."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import HookError, TokensError
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch

_MASK: Final = "_actstore_mask"
"""Attribute of a cache with the mask of its positions, so that copies of a cache have it, too."""


def check_past(given: Any, *, is_known: bool) -> int:
    """How many positions a cache of keys and values holds.

    Args:
        given: the cache.
        is_known: whether the family of the model is in the table.

    Raises:
        HookError: it is none of Hugging Face, or does not keep all keys; or the family is not known.
    """
    from transformers import DynamicCache

    if not isinstance(given, DynamicCache):
        raise HookError(
            f"past_kv_cache is {quoted(given)}; give transformers.DynamicCache(), which the call fills, and give it "
            "again with the tokens that follow"
        )
    if not is_known:
        raise HookError("past_kv_cache is taken only for families whose cache is known")
    if any(given.is_sliding):
        raise HookError(
            "past_kv_cache drops keys outside of a window; give transformers.DynamicCache() without a configuration"
        )
    return int(given.get_seq_length())


def check_rows(past: Any, n_past: int, n_rows: int) -> None:
    """Check that a cache has as many rows as the ids that follow.

    Raises:
        TokensError: it has not.
    """
    if n_past and len(past.layers[0].keys) != n_rows:
        raise TokensError(
            f"past_kv_cache has {len(past.layers[0].keys)} rows, and the tokens have {n_rows}; give as many"
        )


def with_past(
    past: Any, n_past: int, ids: "torch.Tensor", mask: "torch.Tensor | None"
) -> "torch.Tensor | None":
    """The mask [batch, position] over the positions in a cache and those that follow; None if nothing is padded.

    Args:
        past: a cache that `check_past` admits.
        n_past: how many positions it holds.
        ids: the ids that follow [batch, position].
        mask: their mask, or None.

    Raises:
        TokensError: something else has changed the rows or positions of a cache with padding.
    """
    import torch

    known = getattr(past, _MASK, None)
    if known is None and mask is None:
        return None
    if known is None:
        known = ids.new_ones(len(ids), n_past)
    known = known[:, :n_past].to(ids)  # a cache may have been cropped
    if known.shape != (len(ids), n_past):
        raise TokensError(
            f"past_kv_cache has {n_past} positions, and of {known.shape[1]} in {len(known)} rows it is known which are "
            "padding; give ids, with an attention_mask for all positions"
        )
    return torch.cat([known, torch.ones_like(ids) if mask is None else mask.to(ids)], dim=1)


@contextlib.contextmanager
def filled(past: Any, mask: "torch.Tensor | None") -> Iterator[None]:
    """A context of the forward that adds to a cache: the mask stays with it; after an error it is what it was.

    Args:
        past: the cache.
        mask: [batch, position] over all positions, 0 at padding; None if nothing is padded.
    """
    before = [(layer, layer.keys, layer.values, layer.is_initialized) for layer in past.layers]
    try:
        yield
    except BaseException:
        # Some layers have the new keys, and others have not.
        del past.layers[len(before) :]
        for layer, keys, values, is_initialized in before:
            layer.keys, layer.values, layer.is_initialized = keys, values, is_initialized
        raise
    is_padded = mask is not None and not bool(mask.all())
    setattr(past, _MASK, mask if is_padded else None)

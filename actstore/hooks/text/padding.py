"""Padding that ids [batch, position] show themselves: pad tokens at one end of a row."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def get_attention_mask(
    tokenizer: Any, tokens: "torch.Tensor", prepend_bos: bool, padding_side: str | None = None
) -> "torch.Tensor":
    """The mask of padded ids [batch, position]: 0 at pad tokens on the side of padding, else 1.

    A text that ends with the pad token looks padded; `HookedModel.to_tokens_and_mask` knows better.

    Args:
        tokenizer: a tokenizer of Hugging Face; None for a mask of ones.
        tokens: ids.
        prepend_bos: whether rows begin with BOS, which may be the pad token as well.
        padding_side: ``left`` or ``right``; None for that of the tokenizer.
    """
    import torch

    pad = None if tokenizer is None else tokenizer.pad_token_id
    if pad is None:
        return torch.ones_like(tokens)
    begins_with_pad = prepend_bos and tokenizer.bos_token_id == pad
    return _mask(tokens, pad, padding_side or tokenizer.padding_side, begins_with_pad=begins_with_pad)


def mask_of_left_padding(tokens: "torch.Tensor", pad: int, *, begins_with_pad: bool) -> "torch.Tensor | None":
    """The mask of ids [batch, position] that are padded on the left; None where nothing is padded.

    Args:
        tokens: ids.
        pad: what fills rows.
        begins_with_pad: whether rows begin with a BOS token that is the same.
    """
    mask = _mask(tokens, pad, "left", begins_with_pad=begins_with_pad)
    # A row of pad tokens alone is one that somebody wants to run.
    mask[(mask == 0).all(-1)] = 1
    return None if bool(mask.all()) else mask


def _mask(tokens: "torch.Tensor", pad: int, side: str, *, begins_with_pad: bool) -> "torch.Tensor":
    import torch

    mask = torch.ones_like(tokens)
    is_token = tokens != pad
    seen = is_token.cumsum(-1) if side == "left" else is_token.flip(-1).cumsum(-1).flip(-1)
    is_padding = seen == 0
    mask[is_padding] = 0
    if side == "left" and begins_with_pad:
        mask[torch.arange(len(mask)), is_padding.sum(-1) - 1] = 1
    return mask

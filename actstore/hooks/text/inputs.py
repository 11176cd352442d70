"""Token ids and attention masks as users give them, checked before anything is computed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import TokensError
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch


def is_array_of_ids(given: Any) -> bool:
    """Whether something is an array of NumPy with whole numbers, such as the tokens of a store."""
    return isinstance(given, np.ndarray) and given.dtype.kind in "iu"


def as_token_ids(given: Any, n_ctx: int | None) -> "torch.Tensor":
    """Token ids as a tensor [batch, position], int64 or int32, from ids [batch, position] or [position].

    Whether the model has these ids is not checked.

    Raises:
        TokensError: they are no token ids, or rows are longer than ``n_ctx``.
    """
    import torch

    if not isinstance(given, torch.Tensor):
        try:
            given = torch.tensor(given)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise TokensError(f"expected token ids in rows of one length, found {quoted(given)}") from error
    ids: torch.Tensor = given[None] if given.ndim == 1 else given
    # Ids in narrower integers may have overflowed before they came here.
    if ids.ndim != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
        raise TokensError(
            f"expected token ids [batch, position], int64 or int32, found {given.dtype} of shape {tuple(given.shape)}"
        )
    if n_ctx is not None and ids.shape[1] > n_ctx:
        raise TokensError(
            f"rows of {ids.shape[1]} tokens are longer than the {n_ctx} that this model is made for; cut them, as "
            "to_tokens does"
        )
    return ids


def as_mask(given: Any, ids: "torch.Tensor") -> "torch.Tensor":
    """An attention mask [batch, position] as int64, 1 at tokens and 0 at padding.

    Raises:
        TokensError: the mask has another shape or other values, or a row is all padding.
    """
    import torch

    try:
        mask = torch.as_tensor(given)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise TokensError(
            f"attention_mask is {quoted(given)}; give 1 for each token, 0 at padding"
        ) from error
    if mask.shape != ids.shape:
        raise TokensError(
            f"attention_mask has shape {tuple(mask.shape)}, and the token ids {tuple(ids.shape)}; give one entry for "
            "each token"
        )
    other = mask[(mask != 0) & (mask != 1)]  # NaN, too
    if other.numel():
        raise TokensError(
            f"attention_mask has {other[0].item()} in it, and only 1 (a token) and 0 (padding) have a meaning; masks "
            "that number segments or are added to scores are not taken: give each segment as a row of its own"
        )
    empty = (mask == 0).all(-1).nonzero()
    if empty.numel():
        raise TokensError(f"attention_mask leaves no token in row {int(empty[0])}; leave the row out")
    return mask.long()


def embeddable(ids: "torch.Tensor", mask: "torch.Tensor | None", d_vocab: int) -> "torch.Tensor":
    """The ids, with id 0 in place of masked ids that the model has no embedding for; nothing attends to masked ids.

    Raises:
        TokensError: the model has no embedding for an id that is not masked.
    """
    outside = (ids < 0) | (ids >= d_vocab)
    if not bool(outside.any()):
        return ids
    unmasked = ids[outside] if mask is None else ids[outside & mask.bool()]
    if unmasked.numel():
        advice = "" if mask is not None else "; if it stands for padding, give attention_mask"
        raise TokensError(
            f"token id {int(unmasked[0])} is outside of the {d_vocab} ids of this model{advice}"
        )
    return ids.masked_fill(outside, 0)


def check_text(given: Any) -> list[str]:
    """One text or several as a list.

    Raises:
        TokensError: it is something else, such as the result of a tokenizer, or contains half of a surrogate pair.
    """
    if isinstance(given, Mapping) or hasattr(given, "input_ids"):
        raise TokensError(
            f"expected text or token ids, found {type(given).__name__}; give its input_ids, and its attention_mask as "
            "attention_mask"
        )
    is_several = hasattr(given, "__iter__") and not isinstance(given, str | bytes)
    texts = list(given) if is_several else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TokensError(f"expected a text or a list of texts to tokenize, found {quoted(given)}")
    for text in texts:
        check_unicode(text)
    return texts


def check_unicode(text: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        TokensError: the text contains half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokensError(
            f"the text {quoted(text)} has half a surrogate pair at character {error.start}; mend it"
        ) from error

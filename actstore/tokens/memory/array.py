"""Arrays and tensors of token ids, and the masks that say which of them are padding."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.tokens.batch import TokenIds
from actstore.tokens.column import as_int32


def is_array(given: Any) -> bool:
    """Whether this is an array of NumPy, a tensor of torch, or one of another library that NumPy can read."""
    return hasattr(given, "shape") and hasattr(given, "ndim") and hasattr(given, "__array__")


def as_numpy(given: Any) -> NDArray[Any]:
    """An array or a tensor on any device, as NumPy has it. Nothing is copied that is in host memory."""
    if hasattr(given, "detach"):  # torch, which may be on a GPU
        given = given.detach().cpu()
        if given.is_floating_point():  # NumPy lacks bfloat16
            given = given.float()
    return np.asarray(given)


def rows_of(given: Any, where: str) -> Iterator[TokenIds]:
    """The rows of an array of ids [n, position], or the one row of [position], each as int32.

    Raises:
        TokensError: it has another shape, holds no integers, or one that is no token id.
    """
    ids = as_numpy(given)
    if ids.ndim not in (1, 2):
        raise TokensError(
            f"{where} is an array of shape {ids.shape}; give token ids [n, position], or a list of rows"
        )
    for number, row in enumerate(ids[None] if ids.ndim == 1 else ids):
        yield row_of(row, where if ids.ndim == 1 else f"row {number} of {where}")


def row_of(row: NDArray[Any], where: str) -> TokenIds:
    """One row of ids as int32.

    Raises:
        TokensError: it holds no integers, or one that is no token id.
    """
    if row.dtype.kind not in "iu" and row.size:
        raise TokensError(f"{where} holds {row.dtype}, and token ids are integers")
    narrow = as_int32(row)
    if narrow is None:
        bad = row[(row < 0) | (row > np.iinfo(np.int32).max)]
        raise TokensError(
            f"{where} has the token id {bad[0]}, and token ids are 0 to {np.iinfo(np.int32).max}"
        )
    return narrow


def without_padding(ids: TokenIds, mask: Any, where: str) -> TokenIds:
    """The ids of a row that are not padding.

    Args:
        ids: token ids [position].
        mask: attention mask [position], 1 at tokens and 0 at the padding behind them.
        where: the row, for messages.

    Raises:
        TokensError: the mask is of another length or has other values, or padding comes before a token.
    """
    marks = np.asarray(mask if isinstance(mask, list) else as_numpy(mask))
    if marks.shape != ids.shape:
        raise TokensError(
            f"{where} has {len(ids)} token ids and an attention_mask of shape {marks.shape}; give one 1 or 0 for each "
            "id"
        )
    is_token = marks != 0
    if not np.isin(marks, (0, 1)).all():
        raise TokensError(f"the attention_mask of {where} has other values than 1 (a token) and 0 (padding)")
    length = int(is_token.sum())
    if not is_token[:length].all():
        raise TokensError(
            f"{where} is padded on the left, and sequences are padded on the right; give it padded on the right "
            "(tokenizer.padding_side = 'right'), or as a list of rows without padding"
        )
    return ids[:length]

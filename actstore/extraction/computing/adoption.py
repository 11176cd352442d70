"""Adopting a shard that was there before: only one that holds what this worker has computed, but for rounding."""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.extraction.checking.agreement import share_apart

if TYPE_CHECKING:
    import torch

_MOST_APART: Final = 0.1
"""Share of the tokens. In a mixture, rounding on other hardware sends some to another expert."""


def is_same_computation(
    hook: str, stored: NDArray[Any], computed: NDArray[Any], lengths: NDArray[Any], dtype: str
) -> bool:
    """Whether two arrays can be of the same model and text, on whatever hardware.

    Args:
        hook: canonical name.
        stored: [n, position, *shape] in the storage type (bfloat16 as uint16).
        computed: the same by this worker, or its bytes [n, position, nbytes].
        lengths: real tokens of each row, [n]; padding is not looked at.
        dtype: the store's name of the type.
    """
    n_apart = 0.0
    for row, length in enumerate(lengths.tolist()):
        if length:
            left, right = (_tensor(values[row, :length], dtype) for values in (stored, computed))
            n_apart += length * share_apart(hook, left, right, dtype=dtype)
    return n_apart <= _MOST_APART * int(lengths.sum())


def _tensor(values: NDArray[Any], dtype: str) -> "torch.Tensor":
    """[position, size]"""
    import torch

    # Copied, because it can be a map of a file, and tensors are writable; as bytes, for bfloat16. Workers have values
    # as bytes, too.
    data = torch.from_numpy(np.array(values, order="C").reshape(-1).view(np.uint8))
    return data.view(getattr(torch, dtype)).reshape(len(values), -1)

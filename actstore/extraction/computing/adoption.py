"""Deciding whether to adopt a shard that was there before: its values must equal the computed ones up to rounding."""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.extraction.value_checks.agreement import share_apart

if TYPE_CHECKING:
    import torch

_MOST_APART: Final = 0.1
"""Largest share of entries that may differ. In a mixture, rounding on other hardware sends some to other experts."""


def is_same_computation(
    hook: str, stored: NDArray[Any], computed: NDArray[Any], counts: NDArray[Any], dtype: str
) -> bool:
    """Whether two arrays can be of the same model and text, computed on any hardware.

    Args:
        hook: canonical name.
        stored: stored values [n, entry, *shape] in the storage type (bfloat16 as uint16).
        computed: the values that this worker computed, or their bytes [n, entry, nbytes].
        counts: number of entries in use of each row, [n]; others do not count.
        dtype: the store's name of the dtype.
    """
    n_apart = 0.0
    for row, count in enumerate(counts.tolist()):
        if count:
            left, right = (_tensor(values[row, :count], dtype) for values in (stored, computed))
            n_apart += count * share_apart(hook, left, right, dtype=dtype)
    return n_apart <= _MOST_APART * int(counts.sum())


def _tensor(values: NDArray[Any], dtype: str) -> "torch.Tensor":
    """Values as a tensor [position, size] of their own dtype."""
    import torch

    # Copied, because it can be a map of a file, and tensors are writable. As bytes, because NumPy lacks bfloat16 and
    # workers have bytes.
    data = torch.from_numpy(np.array(values, order="C").reshape(-1).view(np.uint8))
    return data.view(getattr(torch, dtype)).reshape(len(values), -1)

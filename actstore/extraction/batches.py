"""The shape of batches, which is the same for every forward of a run."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def filled_up(tokens: NDArray[Any], batch_size: int) -> NDArray[Any]:
    """Token ids filled up to [batch_size, context_length] by repeating the last row.

    Kernels choose their order of summation by shape, so the last batch of a segment has the shape of all others.

    Args:
        tokens: [n, context_length] with 1 <= n <= batch_size.
        batch_size: rows of the result.
    """
    missing = batch_size - len(tokens)
    return np.concatenate([tokens, np.repeat(tokens[-1:], missing, axis=0)]) if missing else tokens

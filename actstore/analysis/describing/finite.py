"""Rows whose features can be counted."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def finite_rows(values: "torch.Tensor") -> NDArray[np.int64] | None:
    """Rows of features [n_rows, n_features] that are finite; None if all are, which is quickly seen."""
    import torch

    # A sum is not finite if an element is not.
    if values.sum(dtype=torch.float64).isfinite():
        return None
    return np.flatnonzero(values.isfinite().all(1).numpy())

"""Rows that were found for each feature."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore


@dataclass(frozen=True)
class FoundRows:
    """Some rows of each feature, and their values."""

    hook: str
    values: NDArray[np.float32]
    """[n_features, k]; NaN where a feature has fewer rows."""
    sequences: NDArray[np.int64]
    """[n_features, k]; -1 where there are fewer."""
    positions: NDArray[np.int64]
    """[n_features, k]; -1 where there are fewer."""
    documents: NDArray[np.int64]
    """Document of each row's token, [n_features, k]; -1 for tokens that packing put in, and where there are fewer."""
    n_rows: int
    """Number of rows that were looked at."""
    n_not_finite: int
    """Rows that hold NaN or infinity, and features that came out as NaN. They are not ranked."""

    store: "CommittedStore" = field(repr=False)
    quantiles: NDArray[np.int64] | None = None
    """Quantile of each row where rows were drawn by quantile, [n_features, k]: 0 for the largest values, -1 where there
    are fewer.
    """

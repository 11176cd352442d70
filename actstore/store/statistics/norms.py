"""The norms of rows that are stored beside them: which numbers they are, and how they lie side by side."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.plan import Plan

UNSET: Final = -1.0
"""In the place of the norm of padding, until it is rounded."""
MOST_APART: Final = 1
"""Steps of float32 between two norms of one row: sums in another order differ in the last bits of float64, and can then
round to neighbours.
"""


def rounded(norms: NDArray[np.float64]) -> NDArray[np.float32]:
    """As they are stored: the nearest float32, infinity where that is too large, NaN for padding. Every NaN has the
    same bits, whatever made it.
    """
    with np.errstate(over="ignore"):
        found = norms.astype(np.float32)
    found[np.isnan(norms) | (norms == UNSET)] = np.nan
    return found


def steps(norms: NDArray[np.float32]) -> NDArray[np.int64]:
    """Numbers that count the float32 from 0 on; NaN comes after infinity."""
    return norms.view(np.int32).astype(np.int64)


def side_by_side(plan: Plan, segment: int, norms: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """What the shard of a segment holds: [rows, hooks, L], padded with zeros to whole inner chunks.

    Args:
        plan: of a run that stores norms.
        segment: its number.
        norms: by hook, [n_sequences, L] of the segment.
    """
    layout = plan.norm_array()
    n_rows = layout.chunks_in(segment) * layout.chunk_rows
    found = np.zeros((n_rows, *layout.shape[1:]), np.float32)
    for number, hook in enumerate(layout.hooks):
        found[: layout.rows_in(segment), number] = norms[hook]
    return found


def difference(stored: NDArray[np.float32], computed: NDArray[np.float32]) -> str | None:
    """What stored norms [n, L] say that cannot be true of the values that these were computed from; None if nothing."""
    apart = np.abs(steps(stored) - steps(computed)) > np.where(np.isnan(computed), 0, MOST_APART)
    if not apart.any():
        return None
    sequence, position = (int(where[0]) for where in np.nonzero(apart))
    there, here = (_shown(norms[sequence, position]) for norms in (stored, computed))
    return f"that of row {sequence}, position {position} is {there}, and the stored values give {here}"


def _shown(norm: Any) -> str:
    return f"{float(norm):.9g}"

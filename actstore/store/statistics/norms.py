"""The stored norms of rows: how they are rounded, arranged and compared."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.plan import Plan

UNSET: Final = -1.0
"""Stands for the norm of padding until norms are rounded."""
MOST_APART: Final = 1
"""Largest difference of two correct norms of one row, in steps of float32: sums in another order differ in the last
bits of float64, and can then round to neighbouring numbers.
"""


def rounded(norms: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round norms as they are stored: to the nearest float32, infinity if too large, NaN for padding. All NaN have the
    same bits.
    """
    with np.errstate(over="ignore"):
        float32_norms = norms.astype(np.float32)
    float32_norms[np.isnan(norms) | (norms == UNSET)] = np.nan
    return float32_norms


def steps(norms: NDArray[np.float32]) -> NDArray[np.int64]:
    """The position of each norm among all float32 from 0 on; NaN comes after infinity."""
    return norms.view(np.int32).astype(np.int64)


def side_by_side(plan: Plan, segment: int, norms: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """The content of the norm shard of a segment, [rows, hooks, width], padded with zeros to whole inner chunks.

    Args:
        plan: the plan of a run that stores norms.
        segment: the number of the segment.
        norms: the norms [n_sequences, width] of the segment, by hook.
    """
    layout = plan.norm_array()
    n_rows = layout.chunks_in(segment) * layout.chunk_rows
    rows = np.zeros((n_rows, *layout.shape[1:]), np.float32)
    for number, hook in enumerate(layout.hooks):
        rows[: layout.rows_in(segment), number] = norms[hook]
    return rows


def difference(stored: NDArray[np.float32], computed: NDArray[np.float32]) -> str | None:
    """Return why stored norms [n, entries] contradict those computed from the values, or None if they do not."""
    apart = np.abs(steps(stored) - steps(computed)) > np.where(np.isnan(computed), 0, MOST_APART)
    if not apart.any():
        return None
    sequence, position = (int(where[0]) for where in np.nonzero(apart))
    there, here = (_shown(norms[sequence, position]) for norms in (stored, computed))
    return f"that of row {sequence}, position {position} is {there}, and the stored values give {here}"


def _shown(norm: Any) -> str:
    return f"{float(norm):.9g}"

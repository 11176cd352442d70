"""Batches: which sequences of a segment share a forward, and how wide that is. `schemas/format.md` is normative."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.plan import Request

WIDTH_STEP: Final = 8
"""Widths are multiples of it, so that forwards have few shapes."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences of a segment."""

    rows: NDArray[np.int64]
    """Their numbers within the segment, in the order of the batch."""
    width: int
    """Positions of the forward; those behind it are padding in all of these sequences."""


def batches_of(request: Request, lengths: NDArray[Any]) -> list[Batch]:
    """The batches of a segment, in the order in which they are computed.

    They follow from the plan and the lengths alone, so everybody makes the same ones. Sequences are sorted by length
    where the plan says so, the longest first: then it is the shortest ones that have a batch to fill up.

    Args:
        request: request of the plan.
        lengths: real tokens of each sequence of the segment, [n].
    """
    size, widest = request.batch_size, request.tokens.context_length
    if request.batching is None:
        return [
            Batch(np.arange(start, min(start + size, len(lengths))), widest)
            for start in range(0, len(lengths), size)
        ]
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches = []
    for start in range(0, len(order), size):
        longest = int(lengths[order[start]])
        batches.append(
            Batch(order[start : start + size], min(-(-longest // WIDTH_STEP) * WIDTH_STEP, widest))
        )
    return batches


def places(batches: Sequence[Batch]) -> NDArray[np.int64] | None:
    """The place of each sequence of a segment among those of all batches, [n]; None if that is its own number."""
    order = np.concatenate([batch.rows for batch in batches])
    if (order[1:] > order[:-1]).all():
        return None
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse

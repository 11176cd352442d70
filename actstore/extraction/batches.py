"""What goes into the forward of a batch, and what of its values is stored."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.hooks.naming.hook_points import point_of
from actstore.store.format.batches import Batch

if TYPE_CHECKING:
    import torch


def filled_up(tokens: NDArray[Any], batch: Batch, batch_size: int) -> NDArray[Any]:
    """Token ids of a batch, [batch_size, width], filled up by repeating its last row.

    Kernels choose their order of summation by shape, so the last batch of a segment has as many rows as all others.

    Args:
        tokens: token ids of the segment, [n, context_length].
        batch: batch of the segment.
        batch_size: rows of the result.
    """
    missing = batch_size - len(batch.rows)
    rows = np.concatenate([batch.rows, np.repeat(batch.rows[-1:], missing)]) if missing else batch.rows
    return np.ascontiguousarray(tokens[rows, : batch.width])


def stored_entries(
    hook: str, value: "torch.Tensor", positions: "torch.Tensor | None", context_length: int
) -> "torch.Tensor":
    """What a store holds of the values of a forward, [row, entry, *shape]; slots that are not in use are zeros.

    Args:
        hook: canonical name.
        value: values with the axes of a store, [row, position, *shape], patterns and scores with as many sources as the
            forward has positions.
        positions: chosen positions [row, slot], -1 for slots that are not in use; None if all are stored.
        context_length: number of sources in the store.
    """
    import torch

    if positions is None:
        return with_all_sources(hook, value, context_length)
    positions = positions.to(value.device, torch.int64)
    rows = torch.arange(len(value), device=value.device)[:, None]
    chosen = with_all_sources(hook, value[rows, positions.clamp(min=0)], context_length)
    return chosen.masked_fill((positions < 0).view(*positions.shape, *(1,) * (value.ndim - 2)), 0.0)


def with_all_sources(hook: str, value: "torch.Tensor", context_length: int) -> "torch.Tensor":
    """Patterns and scores padded to all sources of a row of the store, since no real position sees padding."""
    import torch

    point = point_of(hook)
    assert point is not None
    missing = context_length - value.shape[-1]
    if "source_position" not in point.axes or not missing:
        return value
    unseen = -math.inf if point.leaf == "attn.hook_attn_scores" else 0.0
    return torch.nn.functional.pad(value, (0, missing), value=unseen)

"""Choosing positions of a value."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actstore.errors import HookError

if TYPE_CHECKING:
    import torch

PositionSlice = int | slice | tuple[int | None, ...] | Sequence[int] | None
"""An integer (the axis goes away), a slice, a (start, stop[, step]) tuple, a list of positions, or None for all."""


def at_positions(value: "torch.Tensor", positions: PositionSlice, *, axis: int) -> "torch.Tensor":
    """The value at these positions of an axis.

    Raises:
        HookError: there is no such position.
    """
    if positions is None:
        return value
    if isinstance(positions, tuple):
        positions = slice(*positions)
    if isinstance(positions, slice):
        return value[(slice(None),) * (axis % value.ndim) + (positions,)]
    import torch

    length = value.shape[axis]
    wanted = [positions] if isinstance(positions, int) else list(positions)
    for each in wanted:
        if not -length <= each < length:
            raise HookError(f"position {each} is outside of the {length} positions of this row")
    if isinstance(positions, int):
        return value.select(axis, positions)
    index = torch.tensor([each % length for each in wanted], device=value.device)
    return value.index_select(axis, index)

"""Choosing positions of a value."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
        if len(positions) > 3:
            raise HookError(f"{positions} is no (start, stop, step); give single positions as a list")
        positions = slice(*positions)
    if isinstance(positions, slice):
        return value[(slice(None),) * (axis % value.ndim) + (positions,)]
    import torch

    length = value.shape[axis]
    is_one = not hasattr(positions, "__len__")
    each_of: Any = [positions] if is_one else positions
    try:
        wanted = [operator.index(each) for each in each_of]
    except TypeError as error:
        raise HookError(
            f"positions are {positions!r}; give an integer, a (start, stop) pair, a slice or a list of integers"
        ) from error
    for each in wanted:
        if not -length <= each < length:
            raise HookError(f"position {each} is outside of the {length} positions of this row")
    if is_one:
        return value.select(axis, wanted[0])
    index = torch.tensor([each % length for each in wanted], device=value.device)
    return value.index_select(axis, index)

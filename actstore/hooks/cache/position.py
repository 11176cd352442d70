"""Choosing positions, rows or neurons along an axis of a value."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.cache.slicing import Slice, is_slice_object, unwrapped
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch

PositionSlice = int | slice | tuple[int | None, ...] | Sequence[int] | Slice | None
"""An integer (which removes the axis), a slice, a (start, stop[, step]) tuple, a list of positions, or None for all."""


def at_positions(
    value: "torch.Tensor", positions: PositionSlice, *, axis: int, noun: str = "position"
) -> "torch.Tensor":
    """The value at these positions of an axis.

    Raises:
        HookError: there is no such position, or none is chosen. The message calls positions by the noun.
    """
    positions = unwrapped(positions)
    if positions is None:
        return value
    chosen = indices(positions, value.shape[axis], noun)
    if is_one(positions):
        return value.select(axis, chosen[0])
    if isinstance(positions, tuple | slice):
        ends = positions if isinstance(positions, slice) else slice(*positions)
        return value[(slice(None),) * (axis % value.ndim) + (ends,)]
    import torch

    return value.index_select(axis, torch.tensor(chosen, device=value.device))


def keeping_axis(positions: PositionSlice, size: int) -> PositionSlice:
    """The same choice as `HookedModel.run_with_cache` takes it: an integer keeps its axis, with size 1.

    In TransformerLens, only an integer inside of a Slice removes the axis.

    Raises:
        HookError: there is no such position of this number of positions, or none is chosen.
    """
    if unwrapped(positions) is None:
        return None
    numbers = indices(positions, size, "position")
    return numbers if is_one(positions) and not is_slice_object(positions) else positions


def is_one(chosen: PositionSlice) -> bool:
    """Whether this is an integer, which removes the axis."""
    chosen = unwrapped(chosen)
    return hasattr(chosen, "__index__") and not getattr(chosen, "ndim", 0)


def indices(chosen: PositionSlice, size: int, noun: str) -> list[int]:
    """The indices of 0 ... size - 1 that are chosen; one index for an integer.

    Raises:
        HookError: there is no such index, or none is chosen. The message calls indices by the noun.
    """
    chosen = unwrapped(chosen)
    if chosen is None:
        return list(range(size))
    if isinstance(chosen, tuple):
        if not 1 <= len(chosen) <= 3:
            raise HookError(f"{chosen} is no (start, stop, step); give single {noun}s as a list")
        chosen = slice(*chosen)
    if isinstance(chosen, slice):
        numbers = _in_slice(chosen, size, noun)
    else:
        listed: Any = [chosen] if is_one(chosen) else chosen
        wanted = _integers(listed, noun, chosen)
        for index in wanted:
            if not -size <= index < size:
                raise HookError(f"{noun} {index} is outside of the {size} {noun}s that there are")
        numbers = [index % size for index in wanted]
    if not numbers:
        raise HookError(f"{quoted(chosen)} chooses none of the {size} {noun}s; leave it out to choose all")
    return numbers


def _in_slice(chosen: slice, size: int, noun: str) -> list[int]:
    try:
        numbers = range(size)[chosen]
    except (TypeError, ValueError) as error:
        raise HookError(
            f"{chosen} chooses no {noun}s: its ends are integers, its step is at least 1"
        ) from error
    if numbers.step < 0:
        raise HookError(f"{chosen} runs backwards; choose {noun}s forwards, and flip the values after")
    return list(numbers)


def _integers(listed: Any, noun: str, chosen: object) -> list[int]:
    try:
        wanted = list(listed)
        # True is the integer 1, but a list of truth values is meant as a mask.
        if any(isinstance(item, bool) or str(getattr(item, "dtype", "")).endswith("bool") for item in wanted):
            raise TypeError
        return [operator.index(item) for item in wanted]
    except TypeError as error:
        raise HookError(
            f"{noun}s are {quoted(chosen)}; give an integer, a (start, stop) pair, a slice or a list of integers"
        ) from error

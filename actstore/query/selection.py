"""Parses which rows, positions and elements a request names, into indices along each axis."""

import re
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError
from actstore.query.problem import Problem

Indices = range | NDArray[np.int64]
"""Indices along one axis. A range never goes backwards."""

_INTEGER = r"-?[0-9]{1,18}"
_SLICE: Final = rf"({_INTEGER})?:({_INTEGER})?(:({_INTEGER})?)?"
PATTERN: Final = rf"^({_SLICE}|{_INTEGER}(,{_INTEGER})*)$"
"""Pattern of the text for one axis: ``0:8``, ``:``, ``::2``, ``-1``, ``3,17,99``."""
INNER_PATTERN: Final = rf"^({_SLICE}|{_INTEGER})(,({_SLICE}|{_INTEGER})){{0,7}}$"
"""Pattern of the text for the axes behind the positions: a slice or a number for each, joined by commas."""
FORMS: Final = {
    PATTERN: "it must be a slice (0:8), a number (-1) or a list of numbers (3,17)",
    INNER_PATTERN: "it must be a slice (0:64) or a number for each axis, joined by commas (3,0:64)",
}
"""What texts must be that do not match a pattern, for people."""
_ONE: Final = re.compile(PATTERN)
_MANY: Final = re.compile(INNER_PATTERN)
_SHOWN: Final = 60
_MAX_LISTED: Final = 1_000_000


def parse_axis(text: str, size: int, axis: str) -> Indices:
    """The indices that a text names along an axis. Negative numbers count from the end, slices are cut to the axis, as
    in Python; a number alone keeps the axis, with size 1.

    Raises:
        JobError: the text is malformed.
        Problem: a number outside of the axis.
    """
    if not _ONE.fullmatch(text):
        raise JobError(
            f"{axis} is {text[:_SHOWN]!r}; write a slice (0:8, :, ::2), a number, or numbers joined by commas"
        )
    if ":" in text:
        parts = [int(part) if part else None for part in text.split(":")]
        if parts[2:] == [0]:
            raise JobError(f"{axis} is {text[:_SHOWN]!r}; a slice cannot have step 0")
        indices = range(*slice(*parts).indices(size))
        if indices.step > 0:
            return indices
        if len(indices) > _MAX_LISTED:
            raise JobError(
                f"{axis} goes backwards over {len(indices)}; at most {_MAX_LISTED} can, so ask for less"
            )
        return np.asarray(indices, np.int64)
    return indices_of([int(part) for part in text.split(",")], size, axis)


def indices_of(values: Sequence[int], size: int, axis: str) -> Indices:
    """The indices that a list names along an axis. Neighbours in order come back as a range.

    Raises:
        Problem: a number outside of the axis.
    """
    indices = checked_numbers(values, size, axis)
    if not len(indices):
        return range(0)
    if (np.diff(indices) == 1).all():
        return range(int(indices[0]), int(indices[-1]) + 1)
    return indices


def checked_numbers(values: Sequence[int], size: int, axis: str) -> NDArray[np.int64]:
    """Numbers along an axis, from 0 on; negative ones count from its end.

    Raises:
        Problem: a number outside of the axis.
    """
    for value in values:
        if not -size <= value < size:
            raise Problem(422, "index", f"{axis} has {value}, which is out of bounds for {size} of them")
    numbers = np.array(values, np.int64)
    numbers[numbers < 0] += size
    return numbers


def parse_inner(text: str, shape: Sequence[int]) -> tuple[Indices, ...]:
    """The indices that a text names along the axes behind the positions; axes that it leaves out are whole.

    Raises:
        JobError: the text is malformed, or names more axes than there are.
        Problem: a number outside of an axis.
    """
    if not _MANY.fullmatch(text):
        raise JobError(
            f"inner is {text[:_SHOWN]!r}; write a slice or a number for each axis, joined by commas: 0:4,-1"
        )
    parts = text.split(",")
    if len(parts) > len(shape):
        raise JobError(f"inner names {len(parts)} axes; there are {len(shape)} behind the positions")
    named = [parse_axis(part, size, "inner") for part, size in zip(parts, shape, strict=False)]
    return (*named, *(range(size) for size in shape[len(parts) :]))


def text_of(indices: Indices) -> str:
    """Numbers, none of them negative, as a text that `parse_axis` reads."""
    if isinstance(indices, range):
        return f"{indices.start}:{indices.stop}" + (f":{indices.step}" if indices.step != 1 else "")
    return ",".join(map(str, indices.tolist()))

"""Which rows, positions and elements are asked for, as text and as indices."""

import re
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError
from actstore.query.problem import Problem

Rows = range | NDArray[np.int64]
"""Numbers along one axis. A range never goes backwards."""

_INTEGER = r"-?[0-9]{1,18}"
_SLICE: Final = rf"({_INTEGER})?:({_INTEGER})?(:({_INTEGER})?)?"
PATTERN: Final = rf"^({_SLICE}|{_INTEGER}(,{_INTEGER})*)$"
"""Of one axis: ``0:8``, ``:``, ``::2``, ``-1``, ``3,17,99``."""
INNER_PATTERN: Final = rf"^({_SLICE}|{_INTEGER})(,({_SLICE}|{_INTEGER})){{0,7}}$"
"""Of the axes behind the positions: a slice or a number for each, joined by commas."""
_ONE: Final = re.compile(PATTERN)
_MANY: Final = re.compile(INNER_PATTERN)
_SHOWN: Final = 60
_MAX_LISTED: Final = 1_000_000


def numbers(text: str, size: int, axis: str) -> Rows:
    """What a text asks for along an axis. Negative numbers count from the end, slices are cut to the axis, as in
    Python; a number alone keeps the axis, with size 1.

    Raises:
        JobError: it is no such text.
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
        found = range(*slice(*parts).indices(size))
        if found.step > 0:
            return found
        if len(found) > _MAX_LISTED:
            raise JobError(
                f"{axis} goes backwards over {len(found)}; at most {_MAX_LISTED} can, so ask for less"
            )
        return np.asarray(found, np.int64)
    return listed([int(part) for part in text.split(",")], size, axis)


def listed(values: Sequence[int], size: int, axis: str) -> Rows:
    """The same of a list. Neighbours in order come back as a range.

    Raises:
        Problem: a number outside of the axis.
    """
    for value in values:
        if not -size <= value < size:
            raise Problem(422, "index", f"{axis} has {value}, which is out of bounds for {size} of them")
    found = np.array(values, np.int64)
    found[found < 0] += size
    if not len(found):
        return range(0)
    if (np.diff(found) == 1).all():
        return range(int(found[0]), int(found[-1]) + 1)
    return found


def inner_numbers(text: str, shape: Sequence[int]) -> tuple[Rows, ...]:
    """What a text asks for along the axes behind the positions; those that it does not name are whole.

    Raises:
        JobError: it is no such text, or names more axes than there are.
        Problem: a number outside of an axis.
    """
    if not _MANY.fullmatch(text):
        raise JobError(
            f"inner is {text[:_SHOWN]!r}; write a slice or a number for each axis, joined by commas: 0:4,-1"
        )
    parts = text.split(",")
    if len(parts) > len(shape):
        raise JobError(f"inner names {len(parts)} axes; there are {len(shape)} behind the positions")
    named = [numbers(part, size, "inner") for part, size in zip(parts, shape, strict=False)]
    return (*named, *(range(size) for size in shape[len(parts) :]))


def text_of(rows: Rows) -> str:
    """Numbers, none of them negative, as a text that `numbers` reads."""
    if isinstance(rows, range):
        return f"{rows.start}:{rows.stop}" + (f":{rows.step}" if rows.step != 1 else "")
    return ",".join(map(str, rows.tolist()))

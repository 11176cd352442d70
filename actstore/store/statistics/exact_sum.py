"""Sums without rounding errors, so that they do not depend on the order of their terms."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ExactSum:
    """The element-wise sum of float64 arrays of one shape, rounded once at the end.

    Each running sum passes the rounding error of every addition on to the next, as in Shewchuk, Adaptive precision
    floating-point arithmetic (1997); all of them together are the exact sum. Two or three are enough in practice.

    Terms must be finite and so small that no sum of them overflows. Records of statistics are: `decoded` refuses
    numbers above 1e120.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self._parts: list[NDArray[np.float64]] = []

    def add(self, values: NDArray[np.float64]) -> None:
        """Add an array of this sum's shape.

        Raises:
            ValueError: the array has another shape.
        """
        if values.shape != self._shape:
            raise ValueError(
                f"an array of shape {values.shape} cannot be added to a sum of shape {self._shape}"
            )
        _pass_on(self._parts, np.asarray(values, dtype=np.float64).ravel())

    def value(self) -> NDArray[np.float64]:
        """The exact sum, each element rounded to the nearest float64."""
        # Of two numbers, the rounded sum is what an addition gives; adding 0.0 makes one zero of both.
        rounded = sum(self._parts[:2], np.zeros(math.prod(self._shape)))
        deep = np.any([part != 0 for part in self._parts[2:]], axis=0)
        if np.any(deep):
            columns = zip(*(part[deep] for part in self._parts), strict=True)
            rounded[deep] = [math.fsum(column) for column in columns]
        return rounded.reshape(self._shape)


def _pass_on(parts: list[NDArray[np.float64]], terms: NDArray[np.float64]) -> None:
    """Add ``terms`` to the first part, the rounding errors of that to the second, and so on (Knuth's TwoSum)."""
    for i, part in enumerate(parts):
        total = part + terms
        added = total - part
        terms = (part - (total - added)) + (terms - added)
        parts[i] = total
        if not terms.any():
            return
    parts.append(terms.copy())

"""Sums that lose nothing, so that they do not depend on the order of their terms."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

_HUGE: Final = 2.0**900
"""Larger terms are kept apart and scaled down: below it, 2**120 terms cannot overflow."""
_HUGE_SCALE: Final = 200


class ExactSum:
    """The sum of float64 arrays of one shape, element by element, rounded once at the end.

    Each running sum passes the rounding error of every addition on to the next, as in Shewchuk, Adaptive precision
    floating-point arithmetic (1997); all of them together are the exact sum. Two or three are enough in practice.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self._parts: list[NDArray[np.float64]] = []
        self._huge_parts: list[NDArray[np.float64]] = []
        self._not_finite = np.zeros(math.prod(self._shape))

    def add(self, values: NDArray[np.float64]) -> None:
        """Add an array of this sum's shape.

        Raises:
            ValueError: it has another shape.
        """
        if values.shape != self._shape:
            raise ValueError(
                f"an array of shape {values.shape} cannot be added to a sum of shape {self._shape}"
            )
        terms = np.asarray(values, dtype=np.float64).ravel()
        if not np.abs(terms).max(initial=0.0) < _HUGE:
            terms = self._without_huge(terms)
        _pass_on(self._parts, terms)

    def value(self) -> NDArray[np.float64]:
        """The exact sum, each element rounded to the nearest float64; infinite where that is too large.

        Elements that were ever infinite or NaN are what IEEE arithmetic makes of those terms.
        """
        # Of two numbers, the rounded sum is what an addition gives; adding 0.0 makes one zero of both.
        rounded = sum(self._parts[:2], np.zeros(math.prod(self._shape)))
        deep = np.any([part != 0 for part in self._parts[2:]], axis=0)
        if np.any(deep):
            columns = zip(*(part[deep] for part in self._parts), strict=True)
            rounded[deep] = [math.fsum(column) for column in columns]
        for i in np.flatnonzero(np.any([part != 0 for part in self._huge_parts], axis=0)):
            huge = sum(Fraction(float(part[i])) for part in self._huge_parts) * 2**_HUGE_SCALE
            rounded[i] = _nearest(huge + sum(Fraction(float(part[i])) for part in self._parts))
        special = self._not_finite != 0
        rounded[special] = self._not_finite[special]
        return rounded.reshape(self._shape)

    def _without_huge(self, terms: NDArray[np.float64]) -> NDArray[np.float64]:
        finite = np.isfinite(terms)
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, and is meant to be
            self._not_finite = self._not_finite + np.where(finite, 0.0, terms)
        huge = finite & (np.abs(terms) >= _HUGE)
        _pass_on(self._huge_parts, np.where(huge, terms, 0.0) * 2.0**-_HUGE_SCALE)
        return np.where(finite & ~huge, terms, 0.0)


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


def _nearest(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf

"""Quantiles of norms from counts in logarithmic buckets, which add up exactly."""

import math
from collections import Counter
from itertools import pairwise
from typing import Annotated, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import FailFast, Field, model_validator

from actstore.store.format.document import Document

RELATIVE_ACCURACY: Final = 0.01
GAMMA: Final = (1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY)
MAX_INDEX: Final = 6000
"""Largest index of a bucket, as part of the format. GAMMA ** 6000 is 1e52 and GAMMA ** -6000 is 8e-53: every norm of
float32 values lies between.
"""


def _upper_ends() -> NDArray[np.float64]:
    """The upper ends of buckets ``-MAX_INDEX`` to ``MAX_INDEX``. They are made by repeated multiplication: a logarithm
    would put a norm near an end into different buckets on different machines.
    """
    powers = np.multiply.accumulate(np.full(MAX_INDEX, GAMMA))
    return np.concatenate([1 / powers[::-1], [1.0], powers])


_UPPER_ENDS: Final = _upper_ends()

_Count = Annotated[int, Field(ge=1, lt=2**63)]
_Index = Annotated[int, Field(ge=-MAX_INDEX, le=MAX_INDEX)]


class NormSketch(Document):
    """The number of norms in each bucket; bucket i is ``GAMMA**(i-1) < norm <= GAMMA**i``.

    This is DDSketch by Masson, Rim and Lee (VLDB 2019): a quantile is off by at most 1 %. There are at most 12,001
    buckets, and some hundred in practice.
    """

    n_zero: int = Field(ge=0, lt=2**63)
    buckets: Annotated[tuple[tuple[_Index, _Count], ...], FailFast()]
    """Pairs of index and count, ordered by index; empty buckets are left out."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        indices = [index for index, _ in self.buckets]
        if any(a >= b for a, b in pairwise(indices)):
            raise ValueError("the buckets are not in the order of their indices")
        return self

    @classmethod
    def of(cls, norms: NDArray[np.float64]) -> Self:
        """Count norms that are finite and not negative."""
        positive = norms[norms > 0]
        places = np.minimum(np.searchsorted(_UPPER_ENDS, positive, side="left"), 2 * MAX_INDEX)
        indices, counts = np.unique(places, return_counts=True)
        pairs = zip((indices - MAX_INDEX).tolist(), counts.tolist(), strict=True)
        return cls(n_zero=norms.size - positive.size, buckets=tuple(pairs))

    @property
    def count(self) -> int:
        return self.n_zero + sum(count for _, count in self.buckets)

    def quantile(self, q: float) -> float:
        """The norm of rank ``floor(q * (count - 1))``, counted from 0, within 1 %; NaN if there are no norms.

        Raises:
            ValueError: ``q`` is not between 0 and 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile needs a number between 0 and 1, not {q}")
        if not self.count:
            return math.nan
        rank = math.floor(q * (self.count - 1))
        if rank < self.n_zero:
            return 0.0
        indices, counts = zip(*self.buckets, strict=True)
        bucket = np.searchsorted(np.cumsum(counts), rank - self.n_zero, side="right")
        # Equally far from both ends in relative terms.
        return float(_UPPER_ENDS[indices[bucket] + MAX_INDEX]) * 2 / (1 + GAMMA)


class SketchSum:
    """Adds up sketches exactly."""

    def __init__(self) -> None:
        self._n_zero = 0
        self._buckets: Counter[int] = Counter()

    def add(self, sketch: NormSketch) -> None:
        """Add one more sketch."""
        self._n_zero += sketch.n_zero
        for index, count in sketch.buckets:
            self._buckets[index] += count

    def value(self) -> NormSketch:
        """The sketch of all norms together.

        Raises:
            ValueError: a count is larger than the format allows.
        """
        return NormSketch(n_zero=self._n_zero, buckets=tuple(sorted(self._buckets.items())))

"""Bins of equal width that grow with the values: those of [0, 2 ** exponent), for the least exponent that holds all.

Bins of a larger exponent are unions of those of a smaller one, so counts can be widened and added without any error,
and the bins at the end depend on the largest value alone, not on the order of values.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NO_VALUE: Final = -1000
"""Exponent before the first value."""


def exponents_of(largest: NDArray[Any]) -> NDArray[np.int32]:
    """The least exponents with ``value < 2 ** exponent`` of finite values; `NO_VALUE` where they are 0 or below."""
    exponents = np.frexp(np.maximum(largest, 0).astype(np.float64))[1].astype(np.int32)
    return np.where(largest > 0, exponents, NO_VALUE).astype(np.int32)


def bins_of(values: NDArray[Any], exponents: NDArray[np.int32], n_bins: int) -> NDArray[np.int64]:
    """Number of the bin of each value, exact.

    Args:
        values: values in [0, 2 ** exponent), [n].
        exponents: exponent of each, [n].
        n_bins: number of bins, a power of two.
    """
    return np.ldexp(values.astype(np.float64), n_bins.bit_length() - 1 - exponents).astype(np.int64)


def width_of(exponents: NDArray[np.int32], n_bins: int) -> NDArray[np.float64]:
    """Width of a bin; 0 where there was no value."""
    return np.where(exponents == NO_VALUE, 0.0, np.ldexp(1.0, exponents - n_bins.bit_length() + 1))


def widened(counts: NDArray[np.int64], steps: NDArray[np.int32]) -> NDArray[np.int64]:
    """Counts in the bins of larger exponents.

    Args:
        counts: counts of each bin, [n, n_bins].
        steps: what is added to the exponent of each row, [n], 0 or more.
    """
    out = counts.copy()
    n_bins = counts.shape[1]
    steps = np.minimum(steps, n_bins.bit_length() - 1)
    for step in set(steps.tolist()) - {0}:
        rows = steps == step
        out[rows] = 0
        out[rows, : n_bins >> step] = counts[rows].reshape(-1, n_bins >> step, 1 << step).sum(-1)
    return out

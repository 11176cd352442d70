"""Statistics of hooks: the record of a segment, and the statistics of all segments together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from actstore.errors import StorageError
from actstore.store.format.document import Document
from actstore.store.statistics.array_text import LARGEST, decoded, encoded, upper_triangle
from actstore.store.statistics.norm_sketch import NormSketch

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Size = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]


class HookStatistics(Document):
    """Sums over the tokens of one hook, in one or several segments.

    A token's norm is the Euclidean norm of its value over all axes of the hook. Padding is not counted. A token with
    NaN or infinity is counted only in ``n_not_finite``.
    """

    count: _Count
    n_not_finite: _Count
    sum: str
    """Sum of the values: base64 of little-endian float64 [*shape]."""
    sum_of_norms: _Size
    sum_of_squared_norms: _Size
    max_abs: _Size | None
    """Largest absolute value of any element; null, like the next two fields, if nothing was counted."""
    min_norm: _Size | None
    max_norm: _Size | None
    norms: NormSketch
    second_moment: str | None
    """Sum of outer products of flattened values: base64 of the upper triangle, row by row, little-endian float64."""

    @classmethod
    def of_tokens(
        cls,
        norms: NDArray[np.float64],
        total: NDArray[np.float64],
        max_abs: float,
        second_moment: NDArray[np.float64] | None = None,
    ) -> Self:
        """Make the record of some tokens.

        Args:
            norms: The norm of each token, [n]; NaN or infinite for tokens that are not finite.
            total: Sum of the values of the finite tokens, [*shape].
            max_abs: The largest absolute value among finite tokens.
            second_moment: The second moment of the finite tokens, [D, D] for D elements in a value.
        """
        finite = norms[np.isfinite(norms)]
        some = finite.size > 0
        return cls(
            count=finite.size,
            n_not_finite=norms.size - finite.size,
            sum=encoded(total),
            sum_of_norms=float(finite.sum()),
            sum_of_squared_norms=float(np.square(finite).sum()),
            max_abs=max_abs if some else None,
            min_norm=float(finite.min()) if some else None,
            max_norm=float(finite.max()) if some else None,
            norms=NormSketch.of(finite),
            second_moment=None
            if second_moment is None
            else encoded(second_moment[upper_triangle(len(second_moment))]),
        )

    def check(self, shape: Sequence[int], where: str = "a record of statistics") -> None:
        """Check that the record is consistent, and fits a hook of this shape.

        Raises:
            StorageError: the check failed; ``where`` names the record.
        """
        self.check_counts(where)
        self.arrays(shape, where)

    def check_counts(self, where: str = "a record of statistics") -> None:
        """Check everything except the arrays."""
        if self.norms.count != self.count:
            raise StorageError(
                f"{where} is damaged: {self.count} tokens were counted, and {self.norms.count} norms"
            )
        extremes = (self.max_abs, self.min_norm, self.max_norm)
        if any((extreme is None) != (self.count == 0) for extreme in extremes):
            raise StorageError(
                f"{where} is damaged: max_abs, min_norm and max_norm are null exactly if no token was counted"
            )
        if self.min_norm is not None and self.max_norm is not None and self.min_norm > self.max_norm:
            raise StorageError(f"{where} is damaged: min_norm is larger than max_norm")

    def arrays(
        self, shape: Sequence[int], where: str = "a record of statistics"
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Decode ``sum`` and the packed upper triangle of ``second_moment``, both flat and read-only.

        Raises:
            StorageError: an array does not fit this shape.
        """
        n_elements = math.prod(shape)
        total = decoded(self.sum, n_elements, f"{where}: sum")
        if self.second_moment is None:
            return total, None
        n_packed = n_elements * (n_elements + 1) // 2
        return total, decoded(self.second_moment, n_packed, f"{where}: second_moment")


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """The statistics of a hook, known without reading its values.

    Means are over tokens; the mean of no tokens is NaN.
    """

    record: HookStatistics
    """The record that is stored, and merged with those of further tokens."""
    shape: tuple[int, ...]
    """Shape of the value at one token."""

    @property
    def count(self) -> int:
        """Number of tokens, without padding and without those that are not finite."""
        return self.record.count

    @property
    def n_not_finite(self) -> int:
        """Number of tokens whose value has NaN or infinity; no other figure includes them."""
        return self.record.n_not_finite

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """The mean value, [*shape]."""
        total, _ = self.record.arrays(self.shape)
        return total.reshape(self.shape) / (self.count or math.nan)

    @property
    def mean_norm(self) -> float:
        return self.record.sum_of_norms / (self.count or math.nan)

    @property
    def mean_squared_norm(self) -> float:
        return self.record.sum_of_squared_norms / (self.count or math.nan)

    @property
    def std_norm(self) -> float:
        """Standard deviation of the norms."""
        return math.sqrt(max(0.0, self.mean_squared_norm - self.mean_norm**2)) if self.count else math.nan

    @property
    def max_abs(self) -> float:
        """Largest absolute value of any element."""
        return _or_nan(self.record.max_abs)

    @property
    def min_norm(self) -> float:
        return _or_nan(self.record.min_norm)

    @property
    def max_norm(self) -> float:
        return _or_nan(self.record.max_norm)

    def norm_quantile(self, q: float) -> float:
        """The norm that a share ``q`` of the tokens does not exceed, within 1 %.

        Raises:
            ValueError: ``q`` is not between 0 and 1.
        """
        return min(max(self.record.norms.quantile(q), self.min_norm), self.max_norm)

    @property
    def covariance(self) -> NDArray[np.float64] | None:
        """The covariance [D, D] of the D elements of a flattened value, for the population (divided by ``count``); None
        if the run did not record second moments.

        It is the second moment minus the square of the mean: an entry is off by up to 1e-16 of the squares in it.
        """
        total, packed = self.record.arrays(self.shape)
        if packed is None:
            return None
        upper = upper_triangle(total.size)
        moment = np.zeros(upper.shape)
        moment[upper] = packed
        moment.T[upper] = moment[upper]
        mean = self.mean.ravel()
        return moment / (self.count or math.nan) - np.outer(mean, mean)

    def to_dict(self) -> dict[str, Any]:
        """The statistics as plain data for JSON, without the covariance. Figures of no tokens are None."""

        def number(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            "shape": list(self.shape),
            "count": self.count,
            "n_not_finite": self.n_not_finite,
            "mean": self.mean.tolist() if self.count else None,
            "mean_norm": number(self.mean_norm),
            "mean_squared_norm": number(self.mean_squared_norm),
            "std_norm": number(self.std_norm),
            "max_abs": number(self.max_abs),
            "min_norm": number(self.min_norm),
            "max_norm": number(self.max_norm),
            "norm_quantiles": {str(q): number(self.norm_quantile(q)) for q in _SHOWN},
        }

    def __repr__(self) -> str:
        return (
            f"Statistics(count={self.count}, shape={self.shape}, mean_norm={self.mean_norm:.6g}, "
            f"max_abs={self.max_abs:.6g}, n_not_finite={self.n_not_finite})"
        )

    def __str__(self) -> str:
        return "\n".join(f"{name:<18} {text:>16}" for name, text in self._figures())

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        from actstore.store.showing.html_table import html_table

        return html_table(("", ""), self._figures())

    def _figures(self) -> list[tuple[str, str]]:
        shape = " x ".join(str(size) for size in self.shape) or "1"
        return [
            ("tokens", f"{self.count:,}"),
            ("not finite", f"{self.n_not_finite:,}"),
            ("value", shape),
            ("norm of mean", f"{np.linalg.norm(self.mean):.6g}"),
            ("mean norm", f"{self.mean_norm:.6g}"),
            ("std of norms", f"{self.std_norm:.6g}"),
            ("mean squared norm", f"{self.mean_squared_norm:.6g}"),
            ("largest element", f"{self.max_abs:.6g}"),
            ("smallest norm", f"{self.min_norm:.6g}"),
            *((f"{q:.0%} of norms to", f"{self.norm_quantile(q):.4g}") for q in _SHOWN),
            ("largest norm", f"{self.max_norm:.6g}"),
        ]


_SHOWN: Final = (0.01, 0.1, 0.5, 0.9, 0.99)
"""Quantiles that are printed."""


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value

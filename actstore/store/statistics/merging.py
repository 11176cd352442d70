"""Adding up records of statistics: exactly, so that their order does not matter."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

from pydantic import ValidationError

from actstore.errors import StorageError
from actstore.reason import reason
from actstore.store.statistics.array_text import encoded
from actstore.store.statistics.exact_sum import ExactSum
from actstore.store.statistics.hook_statistics import HookStatistics, Statistics
from actstore.store.statistics.norm_sketch import SketchSum


def merge(records: Iterable[HookStatistics], shape: Sequence[int]) -> Statistics:
    """Statistics of a hook of this shape from its records, the same to the last bit in any order of them.

    Raises:
        StorageError: a record does not fit the shape.
    """
    return Statistics(combined(records, shape), tuple(shape))


def combined(records: Iterable[HookStatistics], shape: Sequence[int]) -> HookStatistics:
    """One record of all their tokens, the same to the last bit in any order of the records.

    Raises:
        StorageError: a record does not fit the shape; together they are larger than values can be.
    """
    merging = Merging(shape)
    for record in records:
        merging.add(record)
    return merging.record()


@dataclass(frozen=True, slots=True)
class _Scalars:
    """The numbers of a record."""

    count: int
    sum_of_norms: float
    sum_of_squared_norms: float
    max_abs: float | None
    min_norm: float | None
    max_norm: float | None

    @classmethod
    def of(cls, record: HookStatistics) -> Self:
        return cls(**{field.name: getattr(record, field.name) for field in fields(cls)})


class Merging:
    """Adds up records of one hook.

    Sums are exact and then rounded to float64, so a record that was combined before differs by that one rounding
    from the records that went into it. Second moments are kept if every record with tokens has one.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self._total: ExactSum | None = None
        """Made for the first record, whose own size then is that of the shape: a damaged plan can name any shape."""
        self._moment: ExactSum | None = None
        self._scalars: list[_Scalars] = []
        self._norms = SketchSum()
        self._n_not_finite = 0

    def add(self, record: HookStatistics) -> None:
        """Count one more.

        Raises:
            StorageError: it does not fit the shape.
        """
        record.check_counts()
        values, packed = record.arrays(self._shape)
        self._n_not_finite += record.n_not_finite
        if not record.count:
            return
        if self._total is None:
            self._total = ExactSum(values.shape)
        self._total.add(values)
        if packed is None:
            self._moment = None
        elif not self._scalars:
            self._moment = ExactSum(packed.shape)
        if self._moment is not None and packed is not None:
            self._moment.add(packed)
        self._norms.add(record.norms)
        # Not the record itself: there can be as many as segments.
        self._scalars.append(_Scalars.of(record))

    def record(self) -> HookStatistics:
        """All of them together.

        Raises:
            StorageError: they are larger than values can be.
        """
        counted = self._scalars
        total = self._total or ExactSum((math.prod(self._shape),))
        try:
            return HookStatistics(
                count=sum(record.count for record in counted),
                n_not_finite=self._n_not_finite,
                sum=encoded(total.value()),
                sum_of_norms=math.fsum(record.sum_of_norms for record in counted),
                sum_of_squared_norms=math.fsum(record.sum_of_squared_norms for record in counted),
                max_abs=max((r.max_abs for r in counted if r.max_abs is not None), default=None),
                min_norm=min((r.min_norm for r in counted if r.min_norm is not None), default=None),
                max_norm=max((r.max_norm for r in counted if r.max_norm is not None), default=None),
                norms=self._norms.value(),
                second_moment=None if self._moment is None else encoded(self._moment.value()),
            )
        except ValidationError as error:
            raise StorageError(
                f"records of statistics are damaged: they add up to more than can be ({reason(error)})"
            ) from error

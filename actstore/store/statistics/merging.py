"""Adding up records of statistics exactly, so that their order does not matter."""

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
    """The statistics of a hook of this shape from its records, equal to the last bit in any order of the records.

    Raises:
        StorageError: a record does not fit the shape.
    """
    return Statistics(combined(records, shape), tuple(shape))


def combined(records: Iterable[HookStatistics], shape: Sequence[int]) -> HookStatistics:
    """The record of the tokens of all records, equal to the last bit in any order of the records.

    Raises:
        StorageError: a record does not fit the shape, or the sum is larger than values can be.
    """
    merging = Merging(shape)
    for record in records:
        merging.add(record)
    return merging.record()


@dataclass(frozen=True, slots=True)
class _Scalars:
    """The scalars of a record."""

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
    """Adds up the records of one hook.

    Sums are exact and are rounded to float64 at the end, so a record that was combined before differs from its parts by
    that one rounding. Second moments are kept if every record with tokens has one.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self._total: ExactSum | None = None
        """The sum of values, made when the first record shows that its size is that of the shape: a damaged plan can
        name any shape.
        """
        self._moment: ExactSum | None = None
        self._scalars: list[_Scalars] = []
        self._norms = SketchSum()
        self._n_not_finite = 0

    def add(self, record: HookStatistics) -> None:
        """Add one more record.

        Raises:
            StorageError: the record does not fit the shape.
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
        # Not the record itself: there can be as many as there are segments.
        self._scalars.append(_Scalars.of(record))

    def record(self) -> HookStatistics:
        """The record of all added records together.

        Raises:
            StorageError: the sum is larger than values can be.
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

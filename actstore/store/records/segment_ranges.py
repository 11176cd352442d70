"""Sets of segment numbers as ranges, which take no memory per number."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, pairwise


class SegmentRanges(Collection[int]):
    """A set of segment numbers from another process, in ascending order."""

    def __init__(self, ranges: Sequence[tuple[int, int]], n_segments: int) -> None:
        """
        Args:
            ranges: the start and stop of each range.
            n_segments: the number of segments in the plan.

        Raises:
            ValueError: the ranges are not within the plan, ascending and separate.
        """
        if any(not 0 <= start < stop <= n_segments for start, stop in ranges):
            raise ValueError(f"segments beyond the {n_segments} of the plan")
        if any(before[1] > after[0] for before, after in pairwise(ranges)):
            raise ValueError("segments twice, or out of order")
        self.ranges = tuple(range(start, stop) for start, stop in ranges)
        self._starts = [numbers.start for numbers in self.ranges]
        self._n = sum(map(len, self.ranges))

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        place = bisect_right(self._starts, number) - 1
        return place >= 0 and number in self.ranges[place]

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self.ranges)

    def __len__(self) -> int:
        return self._n

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SegmentRanges) and self.ranges == other.ranges

    def __hash__(self) -> int:
        return hash(self.ranges)

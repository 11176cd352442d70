"""The order of rows in an epoch, as a pure function of seed, epoch and place: nothing is kept from batch to batch."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.loader.permutation import Permutation

WINDOW_ROWS: Final = 1 << 20
"""The least number of rows that are shuffled among each other, where that is not all of them. Gemma Scope shuffled in
buckets of about 10^6 (arXiv 2408.05147, section 3.3.2).
"""
_AHEAD_ROWS: Final = 1 << 16
"""Read together, where rows are not shuffled."""
_OF_ROWS, _OF_SHARDS, _IN_WINDOW = range(3)
"""Part of the keys, so that permutations of one epoch have nothing to do with each other."""


@dataclass(frozen=True)
class Batches:
    """How the places of an epoch are cut into batches, and a batch into the parts of ranks.

    The batches do not depend on the number of ranks. Each place is in one batch, but for those behind the last whole
    one if ``drop_last`` is set; else they are the last batch, which is smaller.
    """

    n_places: int
    """Rows of an epoch."""
    batch_size: int
    """Rows of a batch, all ranks together."""
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def n_batches(self) -> int:
        """Of an epoch."""
        whole, rest = divmod(self.n_places, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __getitem__(self, k: int) -> range:
        """Places of batch k that belong to this rank.

        Raises:
            IndexError: there is no such batch in an epoch.
        """
        if not 0 <= k < self.n_batches:
            raise IndexError(f"an epoch has batches 0 to {self.n_batches - 1}, not {k}")
        start = k * self.batch_size
        size = min(self.batch_size, self.n_places - start)
        first, end = (size * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(start + first, start + end)


@dataclass(frozen=True)
class Window:
    """Shards whose rows are shuffled among each other."""

    shards: NDArray[np.int64]
    """Their numbers, in no order."""
    start: int
    """First place of the epoch that it fills."""
    ends: NDArray[np.int64]
    """By shard: valid rows of it and of those before it in the window."""

    @property
    def stop(self) -> int:
        return self.start + int(self.ends[-1])


class Order(Protocol):
    """A bijection of the places of an epoch onto the valid rows, which are counted 0 to n - 1."""

    def __call__(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which valid rows are at these places."""

    def windows(self, epoch: int) -> "tuple[Window, ...]":
        """Which shards are read together, in the order of the places; none if rows are read from anywhere."""


def _windows(shards: NDArray[np.int64], counts: NDArray[np.int64], n_rows: int) -> tuple[Window, ...]:
    """Neighbours in a list of shards, taken together until they have so many valid rows."""
    ends = np.cumsum(counts[shards])
    n_places = int(ends[-1])
    found: list[Window] = []
    first = start = 0
    while start < n_places:
        end = int(np.searchsorted(ends, start + n_rows)) + 1
        if end >= len(ends) or n_places - ends[end - 1] < n_rows:
            end = len(ends)  # too few are left for a window of their own
        found.append(Window(shards[first:end], start, ends[first:end] - start))
        first, start = end, int(ends[end - 1])
    return tuple(found)


class InOrder:
    """As they are stored."""

    def __init__(self, starts: NDArray[np.int64]) -> None:
        """
        Args:
            starts: valid rows before each shard, [n_shards + 1]; the last one is the number of all.
        """
        counts = np.diff(starts)
        self._windows = _windows(np.flatnonzero(counts), counts, _AHEAD_ROWS)

    def __call__(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """As `Order`."""
        del epoch  # all are alike
        return places

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """As `Order.windows`."""
        del epoch
        return self._windows


class GlobalShuffle:
    """One permutation of all rows, another one in every epoch."""

    def __init__(self, n_rows: int, seed: int) -> None:
        self._permutation = lru_cache(2)(lambda epoch: Permutation(n_rows, seed, epoch, _OF_ROWS))

    def __call__(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._permutation(epoch)(places)

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """As `Order.windows`."""
        del epoch
        return ()


class WindowShuffle:
    """A permutation of shards, then one of the rows of as many neighbours as have `window_rows` rows together.

    Whoever reads one window after the other reads whole shards, each once an epoch.
    """

    def __init__(self, starts: NDArray[np.int64], seed: int, window_rows: int = WINDOW_ROWS) -> None:
        """
        Args:
            starts: valid rows before each shard, [n_shards + 1]; the last one is the number of all.
            seed: of the shuffle.
            window_rows: the least that a window holds, if there are so many.
        """
        self._starts = starts
        self._counts = np.diff(starts)
        self._seed = seed
        self._window_rows = window_rows
        self._of_epoch = lru_cache(2)(self._make)

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """As `Order.windows`."""
        return self._of_epoch(epoch)

    def _make(self, epoch: int) -> tuple[Window, ...]:
        shards = Permutation(len(self._counts), self._seed, epoch, _OF_SHARDS)(np.arange(len(self._counts)))
        return _windows(shards[self._counts[shards] > 0], self._counts, self._window_rows)

    def __call__(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        windows = self.windows(epoch)
        stops = np.array([window.stop for window in windows])
        which = np.searchsorted(stops, places, side="right")
        found = np.empty(len(places), np.int64)
        for number in np.unique(which).tolist():
            window = windows[number]
            here = which == number
            key = (self._seed, epoch, _IN_WINDOW, number)
            within = Permutation(int(window.ends[-1]), *key)(places[here] - window.start)
            part = np.searchsorted(window.ends, within, side="right")
            # Rows of the window before each shard of it.
            before = window.ends - self._counts[window.shards]
            found[here] = self._starts[window.shards[part]] + within - before[part]
        return found

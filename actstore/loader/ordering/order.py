"""The order of rows in an epoch, as a pure function of seed, epoch and place: nothing is kept from batch to batch."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.loader.ordering.permutation import Permutation

WINDOW_ROWS: Final = 1 << 20
"""The least number of stored rows that are shuffled together, if there are so many. Gemma Scope shuffled in buckets of
about 10^6 (arXiv 2408.05147, section 3.3.2).
"""
AHEAD_ROWS: Final = 1 << 16
"""Rows that are read together if rows are not shuffled."""
_OF_ROWS, _OF_SHARDS, _IN_WINDOW = range(3)
"""Parts of the keys, so that the permutations of one epoch are independent."""


@dataclass(frozen=True)
class Batches:
    """How the places of an epoch are divided into batches, and each batch among ranks.

    The batches do not depend on the number of ranks. Each place is in one batch. The last batch can be smaller; with
    ``drop_last`` it is left out instead.
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
        """Number of batches of an epoch."""
        whole, rest = divmod(self.n_places, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __getitem__(self, k: int) -> range:
        """The places of batch k that belong to this rank.

        Raises:
            IndexError: an epoch has no such batch.
        """
        if not 0 <= k < self.n_batches:
            raise IndexError(f"an epoch has batches 0 to {self.n_batches - 1}, not {k}")
        start = k * self.batch_size
        size = min(self.batch_size, self.n_places - start)
        first, end = (size * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(start + first, start + end)


@dataclass(frozen=True)
class Window:
    """Shards whose rows are shuffled together."""

    shards: NDArray[np.int64]
    """The numbers of the shards, in no order."""
    start: int
    """The first place of the epoch that this window fills."""
    ends: NDArray[np.int64]
    """For each shard, the number of valid rows in it and in the shards before it in the window."""

    @property
    def stop(self) -> int:
        return self.start + int(self.ends[-1])


class Order(Protocol):
    """A bijection of the places of an epoch onto the valid rows, which are counted 0 to n - 1."""

    def __call__(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the valid rows at these places."""

    def windows(self, epoch: int) -> "tuple[Window, ...]":
        """The shards that are read together, in the order of the places; empty if rows are taken from anywhere."""


def _windows(
    shards: NDArray[np.int64], valid: NDArray[np.int64], stored: NDArray[np.int64], window_rows: int
) -> tuple[Window, ...]:
    """Divide a list of shards into windows with about equally many stored rows, since all of them are read.

    Args:
        shards: the numbers of the shards that have valid rows.
        valid: valid rows of each shard of the array.
        stored: all rows of each shard, valid or not.
        window_rows: the least number of rows of a window if shards are of one size; otherwise a window can have less by
            a fraction of a shard.
    """
    ends = np.cumsum(stored[shards])
    largest, total = int(stored[shards].max()), int(ends[-1])
    least = -(-window_rows // largest) * largest  # rounded up to whole shards
    n_windows = max(1, total // least)
    # No shard is larger than the average window, so no two windows end at the same shard.
    edges = np.searchsorted(ends, -(-np.arange(1, n_windows) * total // n_windows)) + 1
    windows: list[Window] = []
    for part in np.split(shards, edges):
        windows.append(Window(part, windows[-1].stop if windows else 0, np.cumsum(valid[part])))
    return tuple(windows)


def largest_window(stored: NDArray[np.int64], window_rows: int) -> tuple[int, int]:
    """(number of windows in an epoch, most stored rows in one), whatever the order of the shards.

    Args:
        stored: rows of each shard that has valid ones, [n_shards].
        window_rows: see `WindowShuffle`.
    """
    largest, total = int(stored.max()), int(stored.sum())
    n_windows = max(1, total // (-(-window_rows // largest) * largest))
    return n_windows, total if n_windows == 1 else min(total, -(-total // n_windows) + largest)


class InOrder:
    """The rows in the order in which they are stored."""

    def __init__(self, starts: NDArray[np.int64], stored: NDArray[np.int64]) -> None:
        """
        Args:
            starts: valid rows before each shard, [n_shards + 1]; the last entry is the number of all.
            stored: rows of each shard, [n_shards], valid or not.
        """
        valid = np.diff(starts)
        self._windows = _windows(np.flatnonzero(valid), valid, stored, AHEAD_ROWS)

    def __call__(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Like `Order`."""
        del epoch  # all epochs are the same
        return places

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """Like `Order.windows`."""
        del epoch
        return self._windows


class GlobalShuffle:
    """One permutation of all rows, a different one in every epoch."""

    def __init__(self, n_rows: int, seed: int) -> None:
        self._permutation = lru_cache(2)(lambda epoch: Permutation(n_rows, seed, epoch, _OF_ROWS))

    def __call__(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._permutation(epoch)(places)

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """Like `Order.windows`."""
        del epoch
        return ()


class WindowShuffle:
    """A permutation of shards, cut into windows of at least `window_rows` rows, then one of the rows of each window.

    Reading one window after the other reads whole shards, each of them once per epoch.
    """

    def __init__(
        self,
        starts: NDArray[np.int64],
        stored: NDArray[np.int64],
        seed: int,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        """
        Args:
            starts: valid rows before each shard, [n_shards + 1]; the last entry is the number of all.
            stored: rows of each shard, [n_shards], valid or not.
            seed: the seed of the shuffle.
            window_rows: the least number of stored rows in a window, if there are so many.
        """
        self._starts = starts
        self._valid = np.diff(starts)
        self._stored = stored
        self._seed = seed
        self._window_rows = window_rows
        self._of_epoch = lru_cache(2)(self._make)

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """Like `Order.windows`."""
        return self._of_epoch(epoch)[0]

    def _make(self, epoch: int) -> tuple[tuple[Window, ...], NDArray[np.int64]]:
        """The windows, and the place at which each of them stops."""
        n_shards = len(self._valid)
        shards = Permutation(n_shards, self._seed, epoch, _OF_SHARDS)(np.arange(n_shards))
        windows = _windows(shards[self._valid[shards] > 0], self._valid, self._stored, self._window_rows)
        return windows, np.array([window.stop for window in windows])

    def __call__(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        windows, stops = self._of_epoch(epoch)
        which = np.searchsorted(stops, places, side="right")
        numbers = np.empty(len(places), np.int64)
        # The places of a batch are consecutive, so they lie in few, consecutive windows.
        for number in range(int(which.min(initial=len(windows))), int(which.max(initial=-1)) + 1):
            window = windows[number]
            here = np.flatnonzero(which == number)
            key = (self._seed, epoch, _IN_WINDOW, number)
            within = Permutation(int(window.ends[-1]), *key)(places[here] - window.start)
            part = np.searchsorted(window.ends, within, side="right")
            # Rows of the window before each of its shards.
            before = window.ends - self._valid[window.shards]
            numbers[here] = self._starts[window.shards[part]] + within - before[part]
        return numbers

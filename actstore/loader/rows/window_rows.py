"""Rows of whole windows in memory: one is read while another is used."""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.loader.ordering.order import Window
from actstore.loader.rows.buffers import new_memory
from actstore.loader.rows.stoppable_blobs import StoppableBlobs
from actstore.storage.local import LocalBlobs
from actstore.store.reading.rows import Rows

N_REQUESTS: Final = 64
"""To remote storage at once: enough for its latency not to matter, if each brings some megabytes."""
COPIED_NBYTES: Final = 4 << 20
"""Rows of a batch that lies in several windows are copied once more on their way, so many at once."""
_LOCAL_READS: Final = 8
"""Of files at once, where they cannot be mapped."""

Values = NDArray[np.uint8]
Shards = tuple[int, ...]


class WindowRows:
    """Reads shards from first to last byte, many at once, and finds rows in what it holds.

    Memory: two windows, however many a batch lies in. Memory of one that is given up is used for the next.
    """

    def __init__(self, rows: Rows, edges: NDArray[np.int64], n_requests: int | None = None) -> None:
        """
        Args:
            rows: the array.
            edges: first sequence of each shard, [n_shards + 1]; the last one is the number of all.
            n_requests: the most to remote storage at once; `N_REQUESTS` if it is not said.
        """
        self._blobs = StoppableBlobs(rows.blobs)
        self._rows = rows.over(self._blobs)
        self._n_requests = _LOCAL_READS if isinstance(rows.blobs, LocalBlobs) else n_requests or N_REQUESTS
        self._edges = edges
        self._length = rows.shape[1]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._held: dict[Shards, _Held] = {}
        self._needed: list[Shards] = []
        self._ahead: list[Shards] = []
        self._is_interrupted = False

    @property
    def nbytes_read(self) -> int:
        """From storage, until now."""
        return self._blobs.nbytes_read

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """As `RowSource.need`."""
        self._needed = [_shards(window) for window in windows]
        self._ahead = [] if ahead is None else [_shards(ahead)]
        self._hold(0)

    def _hold(self, first: int) -> "_Held":
        """Have one of the windows that are needed, and the one after it, and no others."""
        wanted = [*self._needed, *self._ahead][first : first + 2]
        free = [self._held.pop(gone).given_up() for gone in self._held.keys() - set(wanted)]
        for shards in wanted:
            # What failed was told when its rows were asked for; they are asked for again.
            if shards in self._held and self._held[shards].is_lost:
                free.append(self._held.pop(shards).given_up())
            if shards not in self._held:
                self._held[shards] = self._begun(shards, free)
        if self._is_interrupted:
            self.interrupt()  # what was begun since
        return self._held[wanted[0]]

    def _begun(self, numbers: Shards, free: list[Values]) -> "_Held":
        """A window that is being read, into memory that is free if that is enough."""
        shards = np.array(numbers)
        starts, sizes = self._edges[shards], np.diff(self._edges)[shards]
        shape = (int(sizes.sum()), *self._rows.shape[1:])
        nbytes = math.prod(shape) * self._rows.storage.itemsize
        values, stop = _memory(nbytes, free), threading.Event()

        def read() -> None:
            self._blobs.stop = stop
            ranges = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
            out = values[:nbytes].view(self._rows.storage).reshape(shape)
            self._rows.read(np.concatenate(ranges), out, n_requests=self._n_requests)

        return _Held(values, np.cumsum(sizes) - sizes - starts, stop, self._reader.submit(read))

    def gather(self, rows: NDArray[np.int64], out: torch.Tensor) -> None:
        """As `RowSource.gather`, of rows in the windows that were needed last.

        Raises:
            LoaderError: it was interrupted.
        """
        sequences, positions = np.divmod(rows, self._length)
        shards = np.searchsorted(self._edges, sequences, side="right") - 1
        n_left = len(rows)
        for number, needed in enumerate(self._needed):
            which = np.minimum(np.searchsorted(needed, shards), len(needed) - 1)
            here = np.flatnonzero(np.array(needed)[which] == shards)
            if not len(here):
                continue  # of a part of a batch
            held = self._hold(number)
            held.done.result()
            at = (sequences[here] + held.shifts[which[here]]) * self._length + positions[here]
            _copy(held.values, at, here, out)
            del held  # or its memory is there while the next but one is read
            n_left -= len(here)
        if n_left:
            raise ValueError("rows were asked for that are in none of the windows that were needed")

    def interrupt(self) -> None:
        """End what is being read, from any thread, and begin nothing else; whoever waits for it gets an error."""
        self._is_interrupted = True
        for held in tuple(self._held.values()):
            held.end()

    def resume(self) -> None:
        """Read again when asked to."""
        self._is_interrupted = False

    def close(self) -> None:
        """End the thread that reads, after the requests that are under way."""
        self.interrupt()
        self._reader.shutdown(cancel_futures=True)
        self._held.clear()


@dataclass(frozen=True)
class _Held:
    """A window that is in memory once it is read."""

    values: Values
    """Whole sequences, one after the other; it can be longer than they are."""
    shifts: NDArray[np.int64]
    """By shard, in ascending order: what is added to the number of a sequence in the store to find it here."""
    stop: threading.Event
    done: Future[None]

    @property
    def is_lost(self) -> bool:
        """Whether it was not, or will not be, read to its end."""
        return self.stop.is_set() or (self.done.done() and self.done.exception() is not None)

    def end(self) -> None:
        """Have it end soon, if it is still being read."""
        if not self.done.done():
            self.stop.set()

    def given_up(self) -> Values:
        """Its memory, once nothing is read into it any more."""
        self.end()
        if not self.done.cancel():
            self.done.exception()
        return self.values


def _shards(window: Window) -> Shards:
    return tuple(sorted(window.shards.tolist()))


def _memory(nbytes: int, free: list[Values]) -> Values:
    """Some that is free and large enough, or new memory in the place of what is not."""
    while free:
        if free[-1].nbytes >= nbytes:
            return free.pop()
        free.pop()
    return new_memory(nbytes)


def _copy(memory: Values, at: NDArray[np.int64], to: NDArray[np.int64], out: torch.Tensor) -> None:
    """Rows of a window to where they are wanted, which is all places of ``out`` if there are so many.

    In this thread alone: it is faster than storage, and torch's threads would be in the way of those that read.
    """
    found: NDArray[Any] = out.numpy()
    n_rows = memory.nbytes // found.shape[1]
    values = memory[: n_rows * found.shape[1]].reshape(n_rows, -1)
    if len(to) == len(found):
        np.take(values, at, axis=0, out=found, mode="clip")  # any other mode makes a copy first
        return
    step = max(1, COPIED_NBYTES // max(1, found.shape[1]))
    for start in range(0, len(to), step):
        found[to[start : start + step]] = values[at[start : start + step]]

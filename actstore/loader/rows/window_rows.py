"""Rows of whole windows in memory: one window is read while another is used."""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.loader.ordering.order import Window
from actstore.loader.rows.buffers import new_memory
from actstore.loader.rows.stoppable_blobs import StoppableBlobs
from actstore.store.reading.rows import Rows

if TYPE_CHECKING:
    import torch


N_REQUESTS: Final = 64
"""The most requests to remote storage at once: enough to hide latency if each brings some megabytes."""
COPIED_NBYTES: Final = 4 << 20
"""Bytes that are copied at a time when a batch lies in several windows, which takes one more copy of its rows."""
_LOCAL_READS: Final = 8
"""Files that are read at once where they cannot be mapped."""

Values = NDArray[np.uint8]
Shards = tuple[int, ...]


class WindowRows:
    """Reads shards from first to last byte, many at once, and takes rows from the windows in memory.

    It keeps two windows in memory, however many a batch lies in. Memory of a dropped window is reused for the next.
    """

    def __init__(self, rows: Rows, edges: NDArray[np.int64], n_requests: int | None = None) -> None:
        """
        Args:
            rows: the array.
            edges: the first sequence of each shard, [n_shards + 1]; the last entry is the number of all.
            n_requests: the most requests to remote storage at once; `N_REQUESTS` by default.
        """
        self._blobs = StoppableBlobs(rows.blobs)
        self._rows = rows.over(self._blobs)
        self._n_requests = _LOCAL_READS if rows.blobs.is_local else n_requests or N_REQUESTS
        self._edges = edges
        self._length = rows.shape[1]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._held: dict[Shards, _Held] = {}
        self._needed: list[Shards] = []
        self._ahead: list[Shards] = []
        self._is_interrupted = False

    @property
    def nbytes_read(self) -> int:
        """Bytes that were read from storage so far."""
        return self._blobs.nbytes_read

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """Like `RowSource.need`."""
        self._needed = [_shards(window) for window in windows]
        self._ahead = [] if ahead is None else [_shards(ahead)]
        self._load(0)

    def _load(self, first: int) -> "_Held":
        """Keep one of the needed windows and the one after it in memory, and drop all others."""
        wanted = [*self._needed, *self._ahead][first : first + 2]
        free = [self._held.pop(gone).release_memory() for gone in self._held.keys() - set(wanted)]
        for shards in wanted:
            # A window that failed raised its error when its rows were gathered; here it is tried again.
            if shards in self._held and self._held[shards].is_lost:
                free.append(self._held.pop(shards).release_memory())
            if shards not in self._held:
                self._held[shards] = self._start_reading(shards, free)
        if self._is_interrupted:
            self.interrupt()  # windows that were begun since
        return self._held[wanted[0]]

    def _start_reading(self, numbers: Shards, free: list[Values]) -> "_Held":
        """Begin to read a window, into unused memory if that is large enough."""
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

    def gather(self, rows: NDArray[np.int64], out: "torch.Tensor") -> None:
        """Like `RowSource.gather`, for rows in the windows of the last call of `need`.

        Raises:
            LoaderError: reading was interrupted.
        """
        sequences, positions = np.divmod(rows, self._length)
        shards = np.searchsorted(self._edges, sequences, side="right") - 1
        n_left = len(rows)
        for number, needed in enumerate(self._needed):
            which = np.minimum(np.searchsorted(needed, shards), len(needed) - 1)
            here = np.flatnonzero(np.array(needed)[which] == shards)
            if not len(here):
                continue  # the batch is a part, and has no rows in this window
            held = self._load(number)
            held.done.result()
            at = (sequences[here] + held.shifts[which[here]]) * self._length + positions[here]
            _copy(held.values, at, here, out)
            del held  # or its memory stays while the window after the next is read
            n_left -= len(here)
        if n_left:
            raise ValueError("some rows are in none of the windows that need was called with")

    def interrupt(self) -> None:
        """Stop reading, from any thread, and begin nothing more; whoever waits for a window gets an error."""
        self._is_interrupted = True
        for held in tuple(self._held.values()):
            held.end()

    def resume(self) -> None:
        """Allow windows to be read again."""
        self._is_interrupted = False

    def close(self) -> None:
        """End the reading thread, after the requests under way."""
        self.interrupt()
        self._reader.shutdown(cancel_futures=True)
        self._held.clear()


@dataclass(frozen=True)
class _Held:
    """A window that is in memory once it is read."""

    values: Values
    """Whole sequences, one after the other; the memory can be longer."""
    shifts: NDArray[np.int64]
    """For each shard, ascending: what is added to the number of a sequence in the store to get its number in the
    window.
    """
    stop: threading.Event
    done: Future[None]

    @property
    def is_lost(self) -> bool:
        """Whether the window was not, or will not be, read to its end."""
        return self.stop.is_set() or (self.done.done() and self.done.exception() is not None)

    def end(self) -> None:
        """End the read soon, if it is still under way."""
        if not self.done.done():
            self.stop.set()

    def release_memory(self) -> Values:
        """The memory of the window, once nothing is read into it any more."""
        self.end()
        if not self.done.cancel():
            self.done.exception()
        return self.values


def _shards(window: Window) -> Shards:
    return tuple(sorted(window.shards.tolist()))


def _memory(nbytes: int, free: list[Values]) -> Values:
    """Unused memory that is large enough, or new memory in place of what is too small."""
    while free:
        if free[-1].nbytes >= nbytes:
            return free.pop()
        free.pop()
    return new_memory(nbytes)


def _copy(memory: Values, at: NDArray[np.int64], to: NDArray[np.int64], out: "torch.Tensor") -> None:
    """Copy rows of a window to their places in ``out``, which may be all of its places.

    This thread alone copies: it is faster than storage, and torch's threads would slow down those that read.
    """
    target: NDArray[Any] = out.numpy()
    n_rows = memory.nbytes // target.shape[1]
    values = memory[: n_rows * target.shape[1]].reshape(n_rows, -1)
    if len(to) == len(target):
        np.take(values, at, axis=0, out=target, mode="clip")  # any other mode makes a copy first
        return
    step = max(1, COPIED_NBYTES // max(1, target.shape[1]))
    for start in range(0, len(to), step):
        target[to[start : start + step]] = values[at[start : start + step]]

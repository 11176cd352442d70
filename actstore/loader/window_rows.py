"""Rows of whole windows in memory: one is read while another is used."""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.loader.order import Window
from actstore.loader.row_source import select
from actstore.store.rows import Rows

N_REQUESTS: Final = 64
"""To remote storage at once: enough for its latency not to matter, if each brings some megabytes."""

Values = NDArray[np.uint8]
Shards = tuple[int, ...]


class WindowRows:
    """Reads shards from first to last byte, many at once, and finds rows in what it holds.

    Memory: the windows of a batch, mostly one, and the one after it.
    """

    def __init__(self, rows: Rows, edges: NDArray[np.int64]) -> None:
        """
        Args:
            rows: the array.
            edges: first sequence of each shard, [n_shards + 1]; the last one is the number of all.
        """
        self._rows = rows
        self._edges = edges
        self._length = rows.shape[1]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._held: dict[Shards, Future[_Held]] = {}
        self._needed: list[Future[_Held]] = []
        self._free: list[Values] = []

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """As `RowSource.need`."""
        wanted = [
            tuple(sorted(window.shards.tolist()))
            for window in (*windows, *([] if ahead is None else [ahead]))
        ]
        for gone in self._held.keys() - set(wanted):
            over = self._held.pop(gone)
            if not over.cancel() and over.exception() is None:
                self._free.append(over.result().values)
        for shards in wanted:
            read = self._held.get(shards)
            # What failed was told when its rows were asked for; they are asked for again.
            if read is None or (read.done() and read.exception() is not None):
                self._held[shards] = self._reader.submit(self._read, shards)
        self._needed = [self._held[shards] for shards in wanted[: len(windows)]]

    def _read(self, numbers: Shards) -> "_Held":
        shards = np.array(numbers)
        starts, sizes = self._edges[shards], np.diff(self._edges)[shards]
        ranges = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        shape = (int(sizes.sum()), *self._rows.shape[1:])
        nbytes = math.prod(shape) * self._rows.storage.itemsize
        free, self._free = self._free, []
        values = next((memory for memory in free if memory.nbytes >= nbytes), None)
        if values is None:
            values = np.empty(nbytes, np.uint8)
        out = values[:nbytes].view(self._rows.storage).reshape(shape)
        self._rows.read(np.concatenate(ranges), out, n_requests=N_REQUESTS)
        return _Held(values, shards, np.cumsum(sizes) - sizes - starts)

    def gather(self, rows: NDArray[np.int64], out: torch.Tensor) -> None:
        """As `RowSource.gather`, of rows in the windows that were needed last."""
        sequences, positions = np.divmod(rows, self._length)
        shards = np.searchsorted(self._edges, sequences, side="right") - 1
        left = np.ones(len(rows), bool)
        for read in self._needed:
            held = read.result()
            which = np.minimum(np.searchsorted(held.shards, shards), len(held.shards) - 1)
            here = np.flatnonzero(held.shards[which] == shards)
            at = (sequences[here] + held.shifts[which[here]]) * self._length + positions[here]
            n_rows = held.values.nbytes // out.shape[1]
            values = torch.from_numpy(held.values[: n_rows * out.shape[1]]).view(n_rows, -1)
            if len(here) == len(rows):
                select(values, at, out)
                return
            part = torch.empty(len(here), out.shape[1], dtype=torch.uint8)
            select(values, at, part)
            out[torch.from_numpy(here)] = part
            left[here] = False
        if left.any():
            raise ValueError("rows were asked for that are in none of the windows that were needed")

    def close(self) -> None:
        """End the thread that reads."""
        self._reader.shutdown(cancel_futures=True)
        self._held.clear()


@dataclass(frozen=True)
class _Held:
    """A window in memory."""

    values: Values
    """Whole sequences, one after the other; it can be longer than they are."""
    shards: NDArray[np.int64]
    """Ascending."""
    shifts: NDArray[np.int64]
    """By shard: what is added to the number of a sequence in the store to find it here."""

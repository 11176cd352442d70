"""Rows of windows whose shards are files: mapped, so that memory is that of the page cache."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.loader.address_range import AddressRange
from actstore.loader.cached_range import cached_range
from actstore.loader.disk_cache import DiskCache, NoRoomError
from actstore.loader.order import Window
from actstore.loader.shard_places import ShardPlaces
from actstore.loader.window_rows import N_REQUESTS, WindowRows
from actstore.store.local import LocalBlobs
from actstore.store.rows import Rows
from actstore.store.storage_errors import DiskFullError

Shards = tuple[int, ...]


class MappedWindows:
    """A `RowSource` for shards that are all on a disk, or fetched to one, a window at a time.

    The windows of a batch are mapped, and the one after it, which is fetched meanwhile. Where the cache has no room for
    them they are read into memory instead, from then on.
    """

    def __init__(self, rows: Rows, edges: NDArray[np.int64]) -> None:
        """
        Args:
            rows: an array in `LocalBlobs` or a `DiskCache`, that `AddressRange.can_map`.
            edges: first sequence of each shard that windows name, [n_shards + 1]; the last one is the number of all.
        """
        self._rows = rows
        self._edges = edges
        self._length = rows.shape[1]
        self._places = ShardPlaces(rows.layouts)
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._held: dict[Shards, Future[AddressRange]] = {}
        self._stop = threading.Event()
        self._nbytes_opened = 0
        self._wanted: tuple[Sequence[Window], Window | None] = ((), None)
        self._in_memory: WindowRows | None = None

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """As `RowSource.need`."""
        self._wanted = windows, ahead
        if self._in_memory is not None:
            self._in_memory.need(windows, ahead)
            return
        wanted = [self._shards(window) for window in (*windows, *([] if ahead is None else [ahead]))]
        for gone in self._held.keys() - set(wanted):
            self._give_up(self._held.pop(gone))
        for shards in wanted:
            opened = self._held.get(shards)
            # What failed was told when its rows were asked for; they are asked for again.
            if opened is None or (opened.done() and opened.exception() is not None):
                self._held[shards] = self._opener.submit(self._open, np.array(shards))

    def _open(self, shards: NDArray[np.int64]) -> AddressRange:
        blobs = self._rows.blobs
        if isinstance(blobs, DiskCache):
            mapped = cached_range(blobs, self._places, shards, self._stop, N_REQUESTS)
            self._nbytes_opened += mapped.nbytes
            return mapped
        assert isinstance(blobs, LocalBlobs)
        return AddressRange(blobs, self._places, shards)

    @property
    def nbytes_read(self) -> int:
        """Of shards that came from storage or from the cache, until now."""
        return self._nbytes_opened + (0 if self._in_memory is None else self._in_memory.nbytes_read)

    def interrupt(self) -> None:
        """As `WindowRows.interrupt`: shards that are being fetched are fetched to their end."""
        self._stop.set()
        if self._in_memory is not None:
            self._in_memory.interrupt()

    def resume(self) -> None:
        """Fetch again when asked to."""
        self._stop = threading.Event()
        if self._in_memory is not None:
            self._in_memory.resume()

    @staticmethod
    def _give_up(opened: Future[AddressRange]) -> None:
        if not opened.cancel() and opened.exception() is None:
            opened.result().close()

    def gather(self, rows: NDArray[np.int64], out: torch.Tensor) -> None:
        """As `RowSource.gather`, of rows in the windows that were needed last."""
        if self._in_memory is None:
            try:
                self._gather(rows, out)
                return
            except (DiskFullError, NoRoomError) as error:
                self._go_past_the_disk(error)
        assert self._in_memory is not None
        self._in_memory.gather(rows, out)

    def _gather(self, rows: NDArray[np.int64], out: torch.Tensor) -> None:
        shards = self._places(rows)
        is_left = np.ones(len(rows), bool)
        for window in self._wanted[0]:
            mapped = self._held[self._shards(window)].result()
            here = np.flatnonzero(is_left & mapped.has(shards))
            if len(here) == len(rows):
                mapped.gather(rows, out)
                return
            part = torch.empty(len(here), out.shape[1], dtype=torch.uint8)
            mapped.gather(rows[here], part)
            out[torch.from_numpy(here)] = part
            is_left[here] = False
        if is_left.any():
            raise ValueError("rows were asked for that are in none of the windows that were needed")

    def _go_past_the_disk(self, error: DiskFullError | NoRoomError) -> None:
        if isinstance(self._rows.blobs, DiskCache):
            self._rows.blobs.warn_once(error)
        self._close()
        self._in_memory = WindowRows(self._rows, self._edges)
        self._in_memory.need(*self._wanted)

    def close(self) -> None:
        """End the threads, and give the addresses back."""
        self.interrupt()
        self._close()
        if self._in_memory is not None:
            self._in_memory.close()

    def _close(self) -> None:
        self._stop.set()
        self._opener.shutdown(cancel_futures=True)
        for opened in self._held.values():
            self._give_up(opened)
        self._held.clear()

    def _shards(self, window: Window) -> Shards:
        """Those of this array that hold the rows of a window: tokens are in fewer and larger ones than activations."""
        firsts, lasts = self._edges[window.shards], self._edges[window.shards + 1] - 1
        ends = zip(*(self._places(each * self._length).tolist() for each in (firsts, lasts)), strict=True)
        return tuple(sorted({shard for first, last in ends for shard in range(first, last + 1)}))

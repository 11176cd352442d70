"""Windows whose shards are local files, mapped, so that their memory is the page cache."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actstore.loader.cache.disk_cache import DiskCache, NoRoomError
from actstore.loader.ordering.order import Window
from actstore.loader.rows.address_range import AddressRange
from actstore.loader.rows.cached_range import cached_range
from actstore.loader.rows.shard_places import ShardPlaces
from actstore.loader.rows.window_rows import COPIED_NBYTES, N_REQUESTS, WindowRows
from actstore.storage.blobs import are_files
from actstore.storage.errors import DiskFullError
from actstore.store.reading.rows import Rows

if TYPE_CHECKING:
    import torch


Shards = tuple[int, ...]


class MappedWindows:
    """A `RowSource` for shards that are on a local disk, or are fetched to one, window by window.

    The windows of a batch are mapped while the next one is fetched. Once the cache has no room for them, windows are
    read into memory instead.
    """

    def __init__(
        self,
        rows: Rows,
        edges: NDArray[np.int64],
        n_requests: int | None = None,
        before_memory: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            rows: an array of local files or in a `DiskCache` that `AddressRange.can_map` allows.
            edges: the first sequence of each shard that windows name, [n_shards + 1]; the last entry is the number of
                all.
            n_requests: the most requests to remote storage at once; `N_REQUESTS` by default.
            before_memory: called before windows are read into memory; what it raises is raised by `gather`.
        """
        self._rows = rows
        self._n_requests = n_requests or N_REQUESTS
        self._before_memory = before_memory
        self._edges = edges
        self._length = rows.shape[1]
        self._places = ShardPlaces(rows.layouts)
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._held: dict[Shards, _Held] = {}
        self._needed: list[Shards] = []
        self._is_interrupted = False
        self._nbytes_opened = 0
        self._wanted: tuple[Sequence[Window], Window | None] = ((), None)
        self._in_memory: WindowRows | None = None

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """Like `RowSource.need`."""
        self._wanted = windows, ahead
        if self._in_memory is not None:
            self._in_memory.need(windows, ahead)
            return
        self._needed = [self._shards(window) for window in windows]
        wanted = [*self._needed, *([] if ahead is None else [self._shards(ahead)])]
        for gone in self._held.keys() - set(wanted):
            self._held.pop(gone).give_up()
        for shards in wanted:
            # A window that failed raised its error when its rows were gathered; here it is tried again.
            if shards in self._held and self._held[shards].is_lost:
                self._held.pop(shards).give_up()
            if shards not in self._held:
                stop = threading.Event()
                self._held[shards] = _Held(stop, self._opener.submit(self._open, np.array(shards), stop))
        if self._is_interrupted:
            self.interrupt()  # windows that were opened since

    def _open(self, shards: NDArray[np.int64], stop: threading.Event) -> AddressRange:
        blobs = self._rows.blobs
        if isinstance(blobs, DiskCache):
            mapped = cached_range(blobs, self._places, shards, stop, self._n_requests)
            self._nbytes_opened += mapped.nbytes
            return mapped
        assert are_files(blobs)
        return AddressRange(blobs, self._places, shards, checksums=self._rows.checksums)

    @property
    def nbytes_read(self) -> int:
        """Bytes of shards that came from storage or from the cache so far."""
        return self._nbytes_opened + (0 if self._in_memory is None else self._in_memory.nbytes_read)

    def interrupt(self) -> None:
        """Like `WindowRows.interrupt`, except that shards in the midst of a fetch are fetched to their end."""
        self._is_interrupted = True
        for held in tuple(self._held.values()):
            held.end()
        if self._in_memory is not None:
            self._in_memory.interrupt()

    def resume(self) -> None:
        """Allow windows to be fetched again."""
        self._is_interrupted = False
        if self._in_memory is not None:
            self._in_memory.resume()

    def gather(self, rows: NDArray[np.int64], out: "torch.Tensor") -> None:
        """Like `RowSource.gather`, for rows in the windows of the last call of `need`."""
        if self._in_memory is None:
            try:
                self._gather(rows, out)
                return
            except (DiskFullError, NoRoomError) as error:
                self._switch_to_memory(error)
        assert self._in_memory is not None
        self._in_memory.gather(rows, out)

    def _gather(self, rows: NDArray[np.int64], out: "torch.Tensor") -> None:
        import torch

        shards = self._places(rows)
        is_left = np.ones(len(rows), bool)
        for needed in self._needed:
            mapped = self._held[needed].opened.result()
            here = np.flatnonzero(is_left & mapped.has(shards))
            if len(here) == len(rows):
                mapped.gather(rows, out)
                return
            step = max(1, COPIED_NBYTES // max(1, out.shape[1]))
            for start in range(0, len(here), step):
                some = here[start : start + step]
                part = torch.empty(len(some), out.shape[1], dtype=torch.uint8)
                mapped.gather(rows[some], part)
                out[torch.from_numpy(some)] = part
            is_left[here] = False
        if is_left.any():
            raise ValueError("some rows are in none of the windows that need was called with")

    def _switch_to_memory(self, error: DiskFullError | NoRoomError) -> None:
        rows = self._rows
        if self._before_memory is not None:
            self._before_memory()
        if isinstance(rows.blobs, DiskCache):
            rows.blobs.warn_once(error)
            rows = rows.over(rows.blobs.blobs, is_checked=False)
        self._close()
        self._in_memory = WindowRows(rows, self._edges, self._n_requests)
        if self._is_interrupted:
            self._in_memory.interrupt()
        self._in_memory.need(*self._wanted)

    def close(self) -> None:
        """End the threads, and unmap the files."""
        self.interrupt()
        self._close()
        if self._in_memory is not None:
            self._in_memory.close()

    def _close(self) -> None:
        for held in self._held.values():
            held.give_up()
        self._opener.shutdown()
        self._held.clear()

    def _shards(self, window: Window) -> Shards:
        """The shards of this array with the rows of a window. Tokens are in fewer, larger shards than activations."""
        firsts, lasts = self._edges[window.shards], self._edges[window.shards + 1] - 1
        ends = zip(
            *(self._places(sequences * self._length).tolist() for sequences in (firsts, lasts)), strict=True
        )
        return tuple(sorted({shard for first, last in ends for shard in range(first, last + 1)}))


@dataclass(frozen=True)
class _Held:
    """A window that is mapped once all of its files are on the disk."""

    stop: threading.Event
    opened: Future[AddressRange]

    @property
    def is_lost(self) -> bool:
        """Whether the window was not, or will not be, fetched to its end."""
        if self.opened.done():
            return self.opened.exception() is not None
        return self.stop.is_set()

    def end(self) -> None:
        """End the fetch soon, if it is still under way."""
        if not self.opened.done():
            self.stop.set()

    def give_up(self) -> None:
        """Unmap the window once nothing is fetched for it any more."""
        self.end()
        if not self.opened.cancel() and self.opened.exception() is None:
            self.opened.result().close()

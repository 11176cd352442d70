"""Making any batch of a store from nothing but its number."""

import hashlib
import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.loader.batches.batch import Batch, Values, all_tensors_of
from actstore.loader.batches.lent_rows import LentRows
from actstore.loader.batches.transfer import Transfer
from actstore.loader.cache.contents import contents_id
from actstore.loader.cache.disk_cache import DiskCache
from actstore.loader.dropping.drop import valid_rows
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions
from actstore.loader.ordering.order import Batches, GlobalShuffle, InOrder, Order, Window, WindowShuffle
from actstore.loader.rows.address_range import AddressRange
from actstore.loader.rows.buffers import Buffers
from actstore.loader.rows.row_source import CONVERTED_NBYTES, RowSource
from actstore.loader.rows.sources import shard_edges, source_of
from actstore.store.reading.rows import Rows

if TYPE_CHECKING:
    import torch

    from actstore.store.committed_store import CommittedStore

_TOKENS: Final = "tokens"
"""Token ids are gathered as if they were a hook of this name."""
_POSITIONS: Final = "positions"
"""So are the positions of slots."""


@runtime_checkable
class _Interruptible(Protocol):
    """A source that reads far more than a batch at a time."""

    def interrupt(self) -> None: ...

    def resume(self) -> None: ...


class BatchMaker:
    """Knows which rows are in batch k of an epoch, and fetches them. Threads take turns."""

    def __init__(
        self,
        store: "CommittedStore",
        options: LoaderOptions,
        rows: ValidRows | None = None,
        *,
        n_requests: int | None = None,
        before_memory: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            store: the store that the rows are in.
            options: the options of the loader.
            rows: the rows that are not dropped; None finds them.
            n_requests: the most requests to remote storage at once, for each hook; None takes enough to hide latency.
            before_memory: called with the name of an array when the disk has no room for its windows, before they are
                read into memory instead. What it raises is raised for the batch.
        """
        self._n_requests = n_requests
        self._before_memory = before_memory
        self.store = store
        self.options = options
        self._cache: DiskCache | None = None
        if options.cache_dir is not None and not store.tokens.blobs.is_local:
            self._cache = DiskCache(
                store.tokens.blobs,
                options.cache_dir,
                contents_id(store),
                options.cache_limit,
                store.checksums,
            )
        arrays = {hook: store[hook].rows for hook in options.hooks}
        if options.provenance:
            arrays[_TOKENS] = store.tokens
            if store.positions is not None:
                arrays[_POSITIONS] = store.positions
        self._arrays = {name: self._cached(rows) for name, rows in arrays.items()}
        self._dtypes = {hook: store[hook].dtype for hook in options.hooks}
        self._width = store.shape[1]
        self._length = store.plan.context_length
        if rows is None or rows.n_rows != math.prod(store.shape):  # the store can have grown since
            rows = valid_rows(store, options.drop, options.hooks)
        self.rows = rows
        self._edges = shard_edges(self._arrays[options.hooks[0]].layouts)
        self._order = self._make_order()
        self.batches = Batches(
            self.rows.n_valid, options.batch_size, options.drop_last, options.rank, options.world_size
        )
        if not self.batches.n_batches:
            raise LoaderError(
                f"{self.rows.n_valid} rows of {store.url} are left, fewer than one batch of {options.batch_size}, and "
                "all batches are to be of that size; ask for smaller ones"
            )
        self._identity = self._identify()
        self._transfer = None if options.device is None else Transfer(options.device)
        self._buffers = {hook: self._new_buffers() for hook in options.hooks}
        self._nbytes_before = 0
        """Bytes that were read by sources that are closed now."""
        self.begin_process()

    def begin_process(self) -> None:
        """Forget threads, and a lock that another thread may have held: a forked process has neither."""
        self._lock = threading.Lock()
        self._sources: dict[str, RowSource] = {}
        self._is_interrupted = False

    def memory_of_batch(self) -> dict[str, Buffers]:
        """Buffers for one batch at a time, for a caller that accounts for memory itself."""
        return {hook: Buffers(1) for hook in self.options.hooks}

    def _new_buffers(self) -> Buffers:
        """Buffers for the batches of a hook: those that are ready, one in the making, the caller's, and the one it gets
        next.
        """
        is_pinned = self._transfer is not None and self._transfer.is_pinned
        return Buffers(self.options.prefetch + 3, is_pinned=is_pinned)

    def _cached(self, rows: Rows) -> Rows:
        return rows if self._cache is None else rows.over(self._cache, is_checked=True)

    def _make_order(self) -> Order:
        options = self.options
        if options.shuffle == "global":
            return GlobalShuffle(self.rows.n_valid, options.seed)
        edges = self._edges * self._width
        starts, stored = self.rows.rank(edges), np.diff(edges)
        if options.shuffle == "window":
            return WindowShuffle(starts, stored, options.seed, options.window_rows)
        return InOrder(starts, stored)

    def places(self, epoch: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequences and entries of the rows of a batch; nothing is read."""
        return np.divmod(self._numbers(epoch, self.batches[k]), self._width)

    def _numbers(self, epoch: int, places: range) -> NDArray[np.int64]:
        return self.rows.select(self._order(epoch, np.arange(places.start, places.stop)))

    def __call__(self, epoch: int, k: int, memory: dict[str, Buffers] | None = None) -> Values | Batch:
        """Make a batch.

        Args:
            epoch: the number of the epoch.
            k: the number of the batch in the epoch.
            memory: see `memory_of_batch`; None for the maker's own.

        Raises:
            IndexError: an epoch has fewer batches.
            NotCommittedError: a hook is missing for some of the tokens.
            StorageError: rows cannot be read.
        """
        with self._lock:
            return self._make(epoch, self.batches[k], self._buffers if memory is None else memory)

    def lend(self, epoch: int, k: int) -> dict[str, LentRows] | None:
        """The rows of a batch where they lie, by hook; see `can_lend`. Files are checked, rows are not read.

        Returns:
            None if the system allows no more files to be mapped.

        Raises:
            IndexError: an epoch has fewer batches.
            NotCommittedError: a hook is missing for some of the tokens.
            StorageError: a file is missing, too short, or not what was committed.
        """
        with self._lock:
            numbers = self._numbers(epoch, self.batches[k])
            lent = {}
            for hook in self.options.hooks:
                source = self._source(hook)
                if not isinstance(source, AddressRange):
                    return None
                lent[hook] = LentRows(source, numbers)
                lent[hook].check()
            return lent

    def _make(self, epoch: int, places: range, memory: dict[str, Buffers]) -> Values | Batch:
        numbers = self._numbers(epoch, places)
        if len(numbers):  # a rank can have no rows of a small last batch
            windows, ahead = self._windows(epoch, places)
            for name in self._arrays:
                self._source(name).need(windows, ahead)
        options = self.options
        values_by_hook = {hook: self._values(hook, numbers, memory[hook]) for hook in options.hooks}
        values: Values = values_by_hook[options.hooks[0]] if options.is_single else values_by_hook
        if not options.provenance:
            return values
        import torch

        sequences, positions = np.divmod(numbers, self._width)
        if _POSITIONS in self._arrays:
            positions = self._integers(_POSITIONS, numbers).numpy()
        ids = self._integers(_TOKENS, sequences * self._length + positions)
        origin = [torch.from_numpy(sequences), torch.from_numpy(positions), ids]
        if self._transfer is not None:
            origin = [self._transfer(column, column.dtype) for column in origin]
        return Batch(values, *origin)

    def _integers(self, name: str, numbers: NDArray[np.int64]) -> "torch.Tensor":
        """Rows of an array of int32, int64 [n_rows]."""
        import torch

        integers = torch.empty(len(numbers), 1, dtype=torch.int32)
        if len(numbers):
            self._sources[name].gather(numbers, integers.view(torch.uint8))
        return integers[:, 0].long()

    def _windows(self, epoch: int, places: range) -> tuple[tuple[Window, ...], Window | None]:
        """The windows that the places are in, and the window after them."""
        windows = self._order.windows(epoch)
        if not windows:
            return (), None
        first = bisect_right(windows, places.start, key=lambda window: window.stop)
        end = bisect_left(windows, places.stop, key=lambda window: window.stop) + 1
        if end < len(windows):
            return windows[first:end], windows[end]
        is_last = self.options.epochs is not None and epoch + 1 >= self.options.epochs
        return windows[first:end], None if is_last else self._order.windows(epoch + 1)[0]

    def _values(self, hook: str, numbers: NDArray[np.int64], memory: Buffers) -> "torch.Tensor":
        stored, shape = self._dtypes[hook], self._arrays[hook].shape[2:]
        dtype = self.options.dtype or stored
        if self._transfer is not None:
            # Converted on the device: the conversion is more work than a copy, and stored rows are fewer bytes to
            # copy.
            return self._transfer(self._gathered(hook, numbers, stored, memory), dtype).view(
                len(numbers), *shape
            )
        return self._gathered(hook, numbers, dtype, memory).view(len(numbers), *shape)

    def hand_over(self, batch: Values | Batch) -> None:
        """Called by the thread that is about to use a batch."""
        if self._transfer is not None:
            for tensor in all_tensors_of(batch):
                self._transfer.hand_over(tensor)

    def _gathered(
        self, hook: str, numbers: NDArray[np.int64], dtype: "torch.dtype", memory: Buffers
    ) -> "torch.Tensor":
        """The flattened rows in host memory, [n_rows, n]."""
        import torch

        stored, shape = self._dtypes[hook], self._arrays[hook].shape[2:]
        if not len(numbers):
            return torch.empty(0, math.prod(shape), dtype=dtype)
        source = self._sources[hook]
        out = memory.take((len(numbers), math.prod(shape)), dtype)
        if dtype == stored:
            source.gather(numbers, out.view(torch.uint8))
            return out
        if isinstance(source, AddressRange):
            source.gather(numbers, out, stored)
            return out
        step = max(1, CONVERTED_NBYTES // max(1, out.shape[1] * stored.itemsize))
        scratch = torch.empty(min(step, len(numbers)), out.shape[1], dtype=stored)
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step]
            source.gather(part, scratch[: len(part)].view(torch.uint8))
            out[start : start + step].copy_(scratch[: len(part)])
        return out

    def _source(self, name: str) -> RowSource:
        source = self._sources.get(name)
        if source is None:
            before = self._before_memory
            source = source_of(
                self._arrays[name],
                self._edges,
                has_windows=self.options.shuffle != "global",
                n_requests=self._n_requests,
                before_memory=None if before is None else partial(before, name),
            )
            self._sources[name] = source
            if self._is_interrupted and isinstance(source, _Interruptible):
                source.interrupt()
        return source

    def _interruptible(self) -> "list[_Interruptible]":
        return [source for source in tuple(self._sources.values()) if isinstance(source, _Interruptible)]

    def interrupt(self) -> None:
        """Make a thread that waits for a window give up its batch, once the requests under way are done."""
        self._is_interrupted = True
        for source in self._interruptible():
            source.interrupt()

    def resume(self) -> None:
        """Allow batches to be made again."""
        self._is_interrupted = False
        for source in self._interruptible():
            source.resume()

    def identity(self) -> dict[str, Any]:
        """Everything that decides which rows are in batch k, except the ranks."""
        return dict(self._identity)

    def _identify(self) -> dict[str, Any]:
        options = self.options
        tokens = [run.plan.tokens_sha256 for run in self.store.runs if run.plan.has_own_tokens]
        chosen = self.store.plan.request.tokens.positions
        return ({} if chosen is None else {"positions": chosen}) | {
            "tokens": hashlib.sha256("".join(tokens).encode()).hexdigest(),
            "n_rows": self.rows.n_valid,
            "rows": self.rows.checksum,
            "batch_size": options.batch_size,
            "drop_last": options.drop_last,
            "shuffle": options.shuffle,
            "seed": options.seed if options.shuffle else None,
            "window_rows": options.window_rows if options.shuffle == "window" else None,
            "shards": crc32c(self._edges.astype("<i8").data) if options.shuffle == "window" else None,
        }

    @property
    def is_local(self) -> bool:
        """Whether only local files are read."""
        return self._arrays[self.options.hooks[0]].blobs.is_local

    @property
    def known_rows(self) -> ValidRows:
        """The rows that are not dropped."""
        return self.rows

    @property
    def mask_nbytes(self) -> int:
        """Bytes of memory that `rows` takes."""
        return self.rows.nbytes

    @property
    def n_retries(self) -> int:
        """Number of requests to storage that were repeated."""
        return self._arrays[self.options.hooks[0]].blobs.n_retries

    @property
    def nbytes_read(self) -> int:
        """Bytes of windows that were read so far."""
        return self._nbytes_before + sum(
            getattr(source, "nbytes_read", 0) for source in tuple(self._sources.values())
        )

    @property
    def cache_hits_and_misses(self) -> tuple[int, int]:
        """(reads of shards that were in the cache, shards that had to be fetched); zeros without a cache."""
        return (0, 0) if self._cache is None else (self._cache.n_hits, self._cache.n_misses)

    def close(self) -> None:
        """End the threads, after the requests under way, and unmap the files."""
        self.interrupt()
        with self._lock:  # not while another thread gathers: it would read memory that is unmapped
            for source in self._sources.values():
                source.close()
            self._nbytes_before = self.nbytes_read
            self._sources = {}
            self._buffers = {hook: self._new_buffers() for hook in self.options.hooks}
            self._is_interrupted = False

"""Batches that are made once for all who ask for them."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import torch

from actstore.loader.batch import Batch, Values, tensors_of
from actstore.loader.batch_maker import BatchMaker
from actstore.loader.options import LoaderOptions
from actstore.loader.order import Batches
from actstore.query.problem import Problem
from actstore.query.server.metrics import Metrics
from actstore.store.store import Store

_MAX_ORDERS: Final = 16
"""Whose windows and masks a process holds."""
_KEPT: Final = 16
"""Batches of an order at most, the last that were asked for."""
_LATER: Final = {"Retry-After": "1"}

Key = tuple[int, int]
"""Epoch and number of a batch."""


class SharedBatches:
    """The orders that were asked for last, each with its last batches. Threads may share it."""

    def __init__(self, metrics: Metrics, max_held: int) -> None:
        """
        Args:
            metrics: that tell which batches were shared.
            max_held: bytes of batches that are kept, of all orders together.
        """
        self._metrics = metrics
        self._max_held = max_held
        self._lock = threading.Lock()
        self._orders: OrderedDict[Hashable, Future[Order]] = OrderedDict()
        self.held = Held(max_held)

    def order(self, store: Store, options: LoaderOptions) -> "Order":
        """Of a store, for all ranks: `LoaderOptions.rank` is for `Order.batch`.

        Raises:
            LoaderError: no rows are left, or they cannot be read in this order.
            NotCommittedError: a row is not committed.
            StorageError: what must be read cannot be.
        """
        options = replace(options, rank=0, world_size=1, prefetch=_KEPT)
        key = (id(store), options)
        gone: list[Future[Order]] = []
        with self._lock:
            found = self._orders.get(key)
            is_new = found is None
            if found is None:
                found = self._orders[key] = Future()
                while len(self._orders) > _MAX_ORDERS:
                    gone.append(self._orders.popitem(last=False)[1])
            self._orders.move_to_end(key)
        if is_new:
            try:
                found.set_result(Order(store, options, self._metrics, self._max_held // _MAX_ORDERS))
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                found.set_exception(error)
                with self._lock:
                    if self._orders.get(key) is found:
                        del self._orders[key]
        for each in gone:
            if each.done() and each.exception() is None:
                each.result().close()
        return found.result()

    def close(self) -> None:
        """End all threads."""
        with self._lock:
            orders, self._orders = list(self._orders.values()), OrderedDict()
        for each in orders:
            if each.done() and each.exception() is None:
                each.result().close()


class Order:
    """One order of the rows of a store, and the batches that are made of it."""

    def __init__(self, store: Store, options: LoaderOptions, metrics: Metrics, max_held: int) -> None:
        self._store = store  # or its id would be that of another one some day
        self._metrics = metrics
        self.options = options
        self.maker = BatchMaker(store, options)
        rows = min(options.batch_size, self.maker.rows.n_valid)
        nbytes = rows * sum(_row_nbytes(store, hook, options) for hook in options.hooks)
        self._n_kept = max(2, min(_KEPT, max_held // max(1, nbytes)))
        self._lock = threading.Lock()
        self._made: OrderedDict[Key, Future[Values | Batch]] = OrderedDict()
        # torch's threads would wait for each other on cores that send what is ready.
        self._thread = ThreadPoolExecutor(1, "batches", torch.set_num_threads, (1,))
        self._counted = (0, 0, 0)
        self.version = _version(store, self.maker)
        """Another one where any batch is another one."""

    def batch(self, epoch: int, k: int, rank: int = 0, world_size: int = 1) -> Values | Batch:
        """Batch k of an epoch, or the part of it that belongs to a rank.

        Raises:
            IndexError: an epoch has fewer batches.
            LoaderError: the order was given up while it was waited for; ask again.
            StorageError: rows cannot be read.
        """
        whole = self.maker.batches[k]
        with self._lock:
            is_shared = (epoch, k) in self._made
            made = self._begun((epoch, k))
            # Whoever reads batches in order will want the next one.
            if (epoch, k - 1) in self._made and k + 1 < self.maker.batches.n_batches:
                self._begun((epoch, k + 1))
            while len(self._made) > self._n_kept:
                self._made.popitem(last=False)
        self._metrics.count_batch(is_shared=is_shared)
        try:
            found = made.result()
        except CancelledError as error:
            raise _given_up() from error
        if world_size == 1:
            return found
        part = Batches(
            self.maker.rows.n_valid, self.options.batch_size, self.options.drop_last, rank, world_size
        )[k]
        return _rows(found, slice(part.start - whole.start, part.stop - whole.start))

    def _begun(self, key: Key) -> "Future[Values | Batch]":
        found = self._made.get(key)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            try:
                found = self._made[key] = self._thread.submit(self._make, *key)
            except RuntimeError as error:  # the thread has ended
                raise _given_up() from error
        self._made.move_to_end(key)
        return found

    def _make(self, epoch: int, k: int) -> Values | Batch:
        found = self.maker(epoch, k)
        counts = (*self.maker.cache_hits_and_misses, self.maker.nbytes_read)
        self._metrics.count_reads(*(now - before for now, before in zip(counts, self._counted, strict=True)))
        self._counted = counts
        return found

    def close(self) -> None:
        """Give back threads and maps, after the batch that is being made."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.maker.close()


def _version(store: Store, maker: BatchMaker) -> str:
    request = store.plan.request
    known = [
        maker.identity(),
        request.model.fingerprint,
        request.dtype,
        maker.options.hooks,
        str(maker.options.dtype),
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def _given_up() -> Problem:
    return Problem(503, "busy", "others asked for many other orders of batches; ask again", _LATER)


class Held:
    """Bytes of batches that are being sent, which clients hold by being slow."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._n = 0
        self._lock = threading.Lock()

    def hold(self, nbytes: int) -> Callable[[], None]:
        """Count some, until what is returned is called.

        Raises:
            Problem: it would be more than the limit, and not the only one.
        """
        with self._lock:
            if self._n and self._n + nbytes > self._limit:
                raise Problem(503, "busy", "other clients are still taking their batches; ask again", _LATER)
            self._n += nbytes

        def release() -> None:
            with self._lock:
                self._n -= nbytes

        return release


def _row_nbytes(store: Store, hook: str, options: LoaderOptions) -> int:
    acts = store[hook]
    n_elements = 1
    for size in acts.shape[2:]:
        n_elements *= size
    return n_elements * (options.dtype or acts.dtype).itemsize


def _rows(batch: Values | Batch, rows: slice) -> Values | Batch:
    if isinstance(batch, Batch):
        values = _rows(batch.values, rows)
        assert not isinstance(values, Batch)
        return Batch(values, batch.sequences[rows], batch.positions[rows], batch.tokens[rows])
    if isinstance(batch, dict):
        return {hook: values[rows] for hook, values in batch.items()}
    return batch[rows]


def nbytes_of(batch: Values | Batch) -> int:
    """Of all its tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(batch))

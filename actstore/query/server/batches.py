"""Batches that are made once for all who ask for them."""

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import torch

from actstore.errors import LoaderError
from actstore.loader.batch import Batch, Values
from actstore.loader.batch_maker import BatchMaker
from actstore.loader.options import LoaderOptions
from actstore.loader.order import Batches
from actstore.query.problem import LATER, Problem
from actstore.query.server.metrics import Metrics
from actstore.store.store import Store

_MAX_ORDERS: Final = 16
"""Whose windows and masks a process holds."""
_KEPT: Final = 16
"""Batches of an order at most, the last that were asked for."""

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
        nbytes = nbytes_of(store, options)
        self._n_kept = max(2, min(_KEPT, max_held // max(1, nbytes)))
        self._lock = threading.Lock()
        self._made: OrderedDict[Key, Future[Values | Batch]] = OrderedDict()
        # torch's threads would wait for each other on cores that send what is ready.
        self._thread = ThreadPoolExecutor(1, "batches", torch.set_num_threads, (1,))
        self._counted = (0, 0, 0)
        self._is_given_up = False
        self.version = _version(store, self.maker)
        """Another one where any batch is another one."""

    def batch(self, epoch: int, k: int) -> "Future[Values | Batch]":
        """Batch k of an epoch, of all ranks, once it is made; it is not to be cancelled.

        Raises:
            IndexError: an epoch has fewer batches.
            Problem: the order was given up meanwhile; ask again.
        """
        self.maker.batches[k]  # or it is an IndexError
        with self._lock:
            is_shared = (epoch, k) in self._made
            made = self._begun((epoch, k))
            # Whoever reads batches in order will want the next one.
            if (epoch, k - 1) in self._made and k + 1 < self.maker.batches.n_batches:
                self._begun((epoch, k + 1))
            while len(self._made) > self._n_kept:
                self._made.popitem(last=False)
        self._metrics.count_batch(is_shared=is_shared)
        return made

    def part(self, whole: Values | Batch, k: int, rank: int, world_size: int) -> Values | Batch:
        """The rows of batch k that belong to a rank."""
        if world_size == 1:
            return whole
        options = self.options
        batches = Batches(self.maker.rows.n_valid, options.batch_size, options.drop_last, rank, world_size)
        start = self.maker.batches[k].start
        return _rows(whole, slice(batches[k].start - start, batches[k].stop - start))

    def _begun(self, key: Key) -> "Future[Values | Batch]":
        found = self._made.get(key)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            try:
                found = self._made[key] = self._thread.submit(self._make, *key)
            except RuntimeError as error:  # the thread has ended
                raise given_up() from error
        self._made.move_to_end(key)
        return found

    def _make(self, epoch: int, k: int) -> Values | Batch:
        try:
            found = self.maker(epoch, k)
        except LoaderError as error:
            if self._is_given_up:
                raise given_up() from error
            raise
        counts = (*self.maker.cache_hits_and_misses, self.maker.nbytes_read)
        self._metrics.count_reads(*(now - before for now, before in zip(counts, self._counted, strict=True)))
        self._counted = counts
        return found

    def close(self) -> None:
        """Give back threads and maps, after the batch that is being made, or in the midst of it."""
        self._is_given_up = True
        self.maker.interrupt()
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


def given_up() -> Problem:
    """Of an order, while somebody waited for a batch of it."""
    return Problem(503, "busy", "others asked for many other orders of batches; ask again", LATER)


def nbytes_of(store: Store, options: LoaderOptions) -> int:
    """Of a batch, at most."""
    rows = min(options.batch_size, math.prod(store.shape))
    return rows * sum(_row_nbytes(store, hook, options) for hook in options.hooks)


def _row_nbytes(store: Store, hook: str, options: LoaderOptions) -> int:
    acts = store[hook]
    return math.prod(acts.shape[2:]) * (options.dtype or acts.dtype).itemsize


def _rows(batch: Values | Batch, rows: slice) -> Values | Batch:
    if isinstance(batch, Batch):
        values = _rows(batch.values, rows)
        assert not isinstance(values, Batch)
        return Batch(values, batch.sequences[rows], batch.positions[rows], batch.tokens[rows])
    if isinstance(batch, dict):
        return {hook: values[rows] for hook, values in batch.items()}
    return batch[rows]

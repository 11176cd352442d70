"""Makes batches once for all clients that ask for them."""

import hashlib
import json
import threading
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final

from actstore.errors import LoaderError
from actstore.loader.batches.batch import Batch, Values
from actstore.loader.batches.batch_maker import BatchMaker
from actstore.loader.batches.footprint import Footprint, batch_nbytes
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions
from actstore.loader.ordering.order import Batches
from actstore.query.problem import LATER, Problem
from actstore.query.server.memory import heap
from actstore.query.server.memory.budget import Account, MemoryBudget
from actstore.query.server.monitoring.metrics import Metrics
from actstore.query.server.sharing.order_memory import (
    ORDER_NBYTES,
    checked_footprint,
    n_kept_of,
    n_requests_of,
)
from actstore.query.server.sharing.slots import Lease, Lent, Made, Memory, Slots
from actstore.query.server.sharing.torch_loading import use_one_torch_thread
from actstore.store.committed_store import CommittedStore

MOST_AT_ONCE: Final = 64
"""Batches in one reply at most, however small they are: the event loop puts them together, in up to 0.3 ms each. With
so many, the cost of the request itself hardly counts.
"""


class OrderUse:
    """A use of an order, which is not given up until the use is ended, or garbage-collected."""

    def __init__(self, order: "Order", account: Account) -> None:
        self.order = order
        self._end = weakref.finalize(self, account.leave)
        self._end.atexit = False

    def end(self) -> None:
        """End the use; others may then have the memory of the order."""
        self._end()


class SharedBatches:
    """The orders that were used last, as many as there is memory for. Threads may share it."""

    def __init__(self, metrics: Metrics, budget: MemoryBudget) -> None:
        """
        Args:
            metrics: counters of the batches that were shared.
            budget: memory budget of the process.
        """
        self._metrics = metrics
        self._budget = budget
        self._lock = threading.Lock()
        self._orders: dict[Hashable, tuple[Account, Future[Order]]] = {}

    def order(
        self, store: CommittedStore, options: LoaderOptions, client: str, rows: ValidRows | None = None
    ) -> OrderUse:
        """Use an order of a store, of all ranks: `LoaderOptions.rank` is for `Order.part`.

        Args:
            store: store with the rows.
            options: options of the loader.
            client: client that asks.
            rows: rows that are not dropped, where they are known.

        Raises:
            LoaderError: no rows are left, or they cannot be read in this order.
            NotCommittedError: a row is not committed.
            Problem: the order takes more memory than there is.
            StorageError: the store cannot be read.
        """
        key = _key(store, options)
        options = key[1]
        with self._lock:
            known = self._orders.get(key)
            is_new = known is None or not known[0].use(client)
            if known is None or is_new:
                future: Future[Order] = Future()
                account = self._budget.account(client, partial(self._give_up, key, future))
                known = self._orders[key] = account, future
        account, made = known
        if is_new:
            try:
                forget = partial(self._forget, key, made)
                made.set_result(self._make_order(store, options, account, rows, forget))
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                made.set_exception(error)
                self._forget(key, made)
                account.close()
        try:
            return OrderUse(made.result(), account)
        except BaseException:
            account.leave()
            raise

    def ready_order(self, store: CommittedStore, options: LoaderOptions, client: str) -> OrderUse | None:
        """Use an order as `order` does, if it exists already and its batches are lent, so that nothing must be waited
        for; else None.
        """
        with self._lock:
            known = self._orders.get(_key(store, options))
            if known is None or not known[1].done() or known[1].exception() is not None:
                return None
            account, made = known
            if not made.result().is_lent or not account.use(client):
                return None
        return OrderUse(made.result(), account)

    def _make_order(
        self,
        store: CommittedStore,
        options: LoaderOptions,
        account: Account,
        rows: ValidRows | None,
        forget: Callable[[], None],
    ) -> "Order":
        needed = checked_footprint(self._budget, store, options, rows)
        fixed = needed.windows + needed.scratch + ORDER_NBYTES
        # The batch counts from the start: of two orders that fit only without their batches, none could be used.
        account.grow(fixed, fixed + needed.batch)
        account.grow(needed.batch)
        n_kept = n_kept_of(self._budget.limit, needed)
        order = Order(store, options, self._metrics, self._budget, account, needed, n_kept, rows, forget)
        account.shrink(0, needed.batch)
        return order

    def _forget(self, key: Hashable, made: "Future[Order]") -> None:
        with self._lock:
            if key in self._orders and self._orders[key][1] is made:
                del self._orders[key]

    def _give_up(self, key: Hashable, made: "Future[Order]") -> None:
        self._forget(key, made)
        made.result().close()

    def close(self) -> None:
        """Close all orders, and end their threads."""
        with self._lock:
            orders, self._orders = list(self._orders.values()), {}
        for _, made in orders:
            if made.done() and made.exception() is None:
                made.result().close()


def _key(store: CommittedStore, options: LoaderOptions) -> tuple[int, LoaderOptions]:
    """Key of an order, which is the same for all ranks."""
    return id(store), replace(options, rank=0, world_size=1, prefetch=0)


class Order:
    """One order of the rows of a store, and the batches that are made of it."""

    def __init__(
        self,
        store: CommittedStore,
        options: LoaderOptions,
        metrics: Metrics,
        budget: MemoryBudget,
        account: Account,
        needed: Footprint,
        n_kept: int,
        rows: ValidRows | None,
        forget: Callable[[], None],
    ) -> None:
        """
        Args:
            store: store with the rows.
            options: options of the loader.
            metrics: counters of the batches that were shared.
            budget: memory budget of the process.
            account: account that holds the memory of the order, with one batch.
            needed: memory that the order needs; 0 for a batch whose rows are lent.
            n_kept: batches that are kept at most.
            rows: rows that are not dropped, where they are known.
            forget: called when this order cannot go on, so that the next request makes another one.
        """
        self._store = store  # kept, so that no other store gets its id
        self._metrics = metrics
        self._account = account
        self._needed = needed
        self._forget = forget
        self._spilled: set[str] = set()
        self.options = options
        self.maker = BatchMaker(
            store, options, rows, n_requests=n_requests_of(budget, options), before_memory=self._spill
        )
        self._slots = Slots(budget, account, needed.batch, n_kept, self.maker.memory_of_batch)
        # More threads of torch would wait for each other on cores that send batches.
        self._thread = ThreadPoolExecutor(1, "batches", use_one_torch_thread)
        self.is_lent = not needed.batch
        """Whether batches are lent: their rows are sent from where they lie."""
        self._batch_nbytes = batch_nbytes(store, options)
        self._counted = (0, 0, 0)
        self._is_given_up = False
        self.version = _version(store, self.maker)
        """Version of the order; it changes whenever any batch changes."""

    def at_once(self, nbytes: int) -> int:
        """How many batches a client can request together, if they may have ``nbytes`` bytes in all."""
        return max(1, min(MOST_AT_ONCE, nbytes // max(1, self._batch_nbytes))) if self.is_lent else 1

    def batch(self, epoch: int, k: int, client: str, n: int = 1) -> Lease:
        """Lease batch k of an epoch, of all ranks, to a client.

        Args:
            epoch: number of the epoch.
            k: number of the batch in the epoch.
            client: client that asks.
            n: number of batches from k on; more than one only if they are lent.

        Raises:
            IndexError: an epoch has fewer batches.
            Problem: there is no memory for the batch now, or the order was given up meanwhile.
        """
        self.maker.batches[k]  # raises IndexError
        if self.is_lent:
            for _ in range(n):
                self._metrics.count_batch(is_shared=False)
            return Lease(self._submit(self._lend, epoch, k, n))
        lease, is_shared = self._slots.lease((epoch, k), client, partial(self._begin, epoch, k))
        # A client that reads batches in order will want the next one.
        if (epoch, k - 1) in self._slots and k + 1 < self.maker.batches.n_batches:
            self._slots.make_ahead((epoch, k + 1), partial(self._begin, epoch, k + 1))
        self._metrics.count_batch(is_shared=is_shared)
        return lease

    def part(self, whole: Made, k: int, rank: int, world_size: int) -> Made:
        """The rows of batch k that belong to a rank."""
        if world_size == 1:
            return whole
        options = self.options
        batches = Batches(self.maker.rows.n_valid, options.batch_size, options.drop_last, rank, world_size)

        def of_rank(number: int) -> slice:
            start = self.maker.batches[number].start
            return slice(batches[number].start - start, batches[number].stop - start)

        if isinstance(whole, Lent):
            return Lent(
                [
                    {hook: rows[of_rank(number)] for hook, rows in batch.items()}
                    for number, batch in enumerate(whole.batches, k)
                ]
            )
        return _rows(whole, of_rank(k))

    def _begin(self, epoch: int, k: int, memory: Memory) -> "Future[Made]":
        return self._submit(self._make, epoch, k, memory)

    def _submit(self, work: Callable[..., Made], *args: Any) -> "Future[Made]":
        try:
            return self._thread.submit(work, *args)
        except RuntimeError as error:  # the thread has ended
            raise order_given_up() from error

    def _lend(self, epoch: int, k: int, n: int) -> Lent:
        batches = [self.maker.lend(epoch, number) for number in range(k, k + n)]
        if None in batches:
            self._forget()
            raise order_given_up()
        return Lent([rows for rows in batches if rows is not None])

    def _make(self, epoch: int, k: int, memory: Memory) -> Values | Batch:
        try:
            batch = self.maker(epoch, k, memory)
        except LoaderError as error:
            if self._is_given_up:
                raise order_given_up() from error
            raise
        counts = (*self.maker.cache_hits_and_misses, self.maker.nbytes_read)
        self._metrics.count_reads(*(now - before for now, before in zip(counts, self._counted, strict=True)))
        self._counted = counts
        return batch

    def _spill(self, name: str) -> None:
        """Hold memory for the windows of an array, for which the disk has no room."""
        nbytes = self._needed.spilled.get(name, 0)
        if name not in self._spilled:
            self._account.grow(nbytes, nbytes)
            self._spilled.add(name)

    def close(self) -> None:
        """Give back threads, maps and memory; a batch that is being made is interrupted."""
        self._is_given_up = True
        self.maker.interrupt()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.maker.close()
        self._slots.close()
        heap.trim()
        self._account.close()


def _version(store: CommittedStore, maker: BatchMaker) -> str:
    request = store.plan.request
    known = [
        maker.identity(),
        request.model.fingerprint,
        request.dtype,
        maker.options.hooks,
        str(maker.options.dtype),
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def order_given_up() -> Problem:
    """The problem of an order that was given up while a client waited for a batch of it."""
    return Problem(503, "busy", "others asked for many other orders of batches; ask again", LATER)


def _rows(batch: Values | Batch, rows: slice) -> Values | Batch:
    if isinstance(batch, Batch):
        values = _rows(batch.values, rows)
        assert not isinstance(values, Batch)
        return Batch(values, batch.sequences[rows], batch.positions[rows], batch.tokens[rows])
    if isinstance(batch, dict):
        return {hook: values[rows] for hook, values in batch.items()}
    return batch[rows]

"""Reads batches that a server makes."""

import http.client
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.errors import LoaderError, StorageError
from actstore.loader.batches.batch import Batch, Values, all_tensors_of, tensors_of
from actstore.loader.batches.batch_maker import BatchMaker
from actstore.loader.batches.transfer import Transfer
from actstore.loader.dropping.drop import NONFINITE, PAD, valid_rows
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions, dtype_name
from actstore.loader.ordering.order import Batches
from actstore.loader.rows.buffers import Buffers
from actstore.query.client.bounds import check_length, shown, unexpected
from actstore.query.client.connections import read_into
from actstore.query.client.safetensors import read_header
from actstore.query.client.served_rows import check_kind
from actstore.query.client.server import Server
from actstore.query.documents import OrderDocument
from actstore.query.selection import indices_of, text_of
from actstore.query.wire import (
    N_HERE,
    OPTIONS_AS_THEY_ARE,
    ORDER,
    POSITIONS,
    RAW,
    SAFETENSORS,
    SEQUENCES,
    TOKENS,
)
from actstore.storage.errors import RequestError

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

_REQUESTS: Final = 2
"""Number of requests under way at once: the server begins with the second one while the first is being sent."""
_AT_ONCE_NBYTES: Final = 64 << 20
"""The most bytes of batches in one request."""
Key = tuple[int, int]
"""Epoch and number of a batch."""
_MAX_DIGITS: Final = 6
_ORIGIN: Final = (SEQUENCES, POSITIONS, TOKENS)


class ServedBatches:
    """A `BatchSource` whose batches a server makes, with the order and the dropped rows. Threads take turns."""

    def __init__(self, store: "CommittedStore", server: Server, options: LoaderOptions) -> None:
        """
        Args:
            store: store on the server.
            server: server that makes the batches.
            options: options of the loader, without a mask.

        Raises:
            LoaderError: no rows are left, or they cannot be read in this order.
            StorageError: the server does not answer.
        """
        self.options = options
        self._store = store
        self._server = server
        self._query = _query(options)
        order = server.document(OrderDocument, "/batches", self._query)
        self._identity = order.identity
        self._version = order.version
        self.batches = Batches(
            order.n_rows, options.batch_size, options.drop_last, options.rank, options.world_size
        )
        self._check_order(order)
        self._kinds = {
            hook: (dtype_name(options.dtype or store[hook].dtype), store[hook].shape[2:])
            for hook in options.hooks
        }
        """Type of each hook in a batch, and shape of its rows."""
        self._transfer = None if options.device is None else Transfer(options.device)
        is_pinned = self._transfer is not None and self._transfer.is_pinned
        self._at_once = self._n_at_once(order) if options.prefetch else 1
        n_kept = options.prefetch + 2 + _REQUESTS * self._at_once
        self._buffers = {hook: Buffers(n_kept, is_pinned=is_pinned) for hook in options.hooks}
        self.begin_process()

    is_local = False
    cache_hits_and_misses = (0, 0)
    known_rows: ValidRows | None = None

    def begin_process(self) -> None:
        """Forget locks, which a thread of the parent process may have held when this process was forked."""
        self._lock = threading.Lock()
        self._taking = threading.Lock()  # two threads would be given the same memory otherwise
        self._is_interrupted = False
        self._threads: ThreadPoolExecutor | None = None
        self._requested: dict[Key, Future[Values | Batch]] = {}
        self._unwanted: weakref.WeakSet[Future[Values | Batch]] = weakref.WeakSet()
        """Requested batches that nobody waits for any more."""

    def _n_at_once(self, order: OrderDocument) -> int:
        if not self._is_raw:
            return 1
        dtype, inner = self._kinds[self.options.hooks[0]]
        itemsize: int = getattr(torch, dtype).itemsize
        nbytes = len(self.batches[0]) * math.prod(inner) * itemsize
        return max(1, min(order.at_once, self.batches.n_batches, _AT_ONCE_NBYTES // max(1, nbytes)))

    @property
    def _is_raw(self) -> bool:
        return self.options.is_single and not self.options.provenance

    @cached_property
    def rows(self) -> ValidRows:
        """Rows that are not dropped, computed here from the tokens of the store."""
        return valid_rows(self._store, self.options.drop, self.options.hooks)

    @property
    def mask_nbytes(self) -> int:
        """0, as the mask is on the server."""
        return 0

    @property
    def n_retries(self) -> int:
        """Number of requests that were repeated."""
        return self._server.n_retries

    @property
    def nbytes_read(self) -> int:
        """Bytes of batches that were read until now."""
        return self._server.nbytes_read

    def identity(self) -> dict[str, Any]:
        """Implements `BatchSource.identity`."""
        return dict(self._identity)

    def places(self, epoch: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Implements `BatchSource.places`; computed here, as a loader that reads storage does."""
        return self._order.places(epoch, k)

    @cached_property
    def _order(self) -> BatchMaker:
        """The order of the rows; it makes no batches here."""
        return BatchMaker(self._store, self.options, self.rows)

    def __call__(self, epoch: int, k: int) -> Values | Batch:
        """Implements `BatchSource.__call__`.

        Raises:
            LoaderError: the source was interrupted.
        """
        self.batches[k]  # raises IndexError
        with self._lock:
            if self._is_interrupted:
                raise LoaderError("the loader was closed, or moved to another batch; request the batch again")
            if not self.options.prefetch:
                wanted: Future[Values | Batch] = Future()
                self._fetch(epoch, k, [wanted])
                return self._moved(wanted.result())
            self._request(self._following(epoch, k))
            return self._moved(self._requested.pop((epoch, k)).result())

    def _request(self, wanted: list[list[Key]]) -> None:
        """Request these batches, those of each list together, and give up all others."""
        keys = {key for together in wanted for key in together}
        for key in self._requested.keys() - keys:
            self._give_up(self._requested.pop(key))
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="batches")
        for together in wanted:
            new = [key for key in together if not self._is_requested(key)]
            # Batches between them were requested together with others that failed; too rare for more care.
            for run in _runs(new):
                futures: list[Future[Values | Batch]] = [Future() for _ in run]
                self._requested.update(zip(run, futures, strict=True))
                self._threads.submit(self._fetch, *run[0], futures)

    def _give_up(self, future: "Future[Values | Batch]") -> None:
        self._unwanted.add(future)
        future.cancel()

    def _is_requested(self, key: Key) -> bool:
        future = self._requested.get(key)
        return future is not None and not (future.done() and future.exception() is not None)

    def _following(self, epoch: int, k: int) -> list[list[Key]]:
        """The batch and those to request ahead, grouped by request."""
        requests, epochs = list[list[Key]](), self.options.epochs
        while len(requests) < _REQUESTS and (epochs is None or epoch < epochs):
            # The groups are the same wherever a loader begins.
            stop = min((k // self._at_once + 1) * self._at_once, self.batches.n_batches)
            requests.append([(epoch, number) for number in range(k, stop)])
            epoch, k = (epoch, stop) if stop < self.batches.n_batches else (epoch + 1, 0)
        return requests

    def _check_order(self, order: OrderDocument) -> None:
        """Check the numbers of rows and batches that the server gave.

        Raises:
            StorageError: this store cannot have such an order.
        """
        most = math.prod(self._store.shape)
        if not 1 <= order.n_rows <= most:
            raise StorageError(
                f"{self._server.url}/batches gave {order.n_rows} rows where 1 to {most} were expected; open the store "
                "again if it has grown since, or tell whoever runs the server"
            )
        if order.n_batches != self.batches.n_batches or not order.n_batches:
            raise unexpected(
                f"{self._server.url}/batches",
                f"{order.n_batches} batches of {order.n_rows} rows",
                f"{self.batches.n_batches}, and one at least,",
            )

    def _fetch(self, epoch: int, k: int, futures: "list[Future[Values | Batch]]") -> None:
        """Fetch the batches from k on; each is given as soon as it is here."""
        is_wanted = [future.set_running_or_notify_cancel() for future in futures]
        n_given = 0
        try:
            while n_given < len(futures) and any(is_wanted):
                n_given += self._fetch_some(epoch, k + n_given, futures[n_given:])
                is_wanted = [future not in self._unwanted for future in futures[n_given:]]
        except BaseException as error:  # noqa: BLE001 - it is raised where they are waited for
            for future in futures[n_given:]:
                if not future.done():
                    future.set_exception(error)

    def _fetch_some(self, epoch: int, k: int, futures: "list[Future[Values | Batch]]") -> int:
        """Fetch as many of the batches as one reply has, and return how many these are."""
        accept = RAW if self._is_raw else SAFETENSORS
        query = {**self._query, "epoch": epoch}
        if len(futures) > 1:
            query["count"] = len(futures)

        def take(reply: http.client.HTTPResponse) -> int:
            if reply.getheader(ORDER) != self._version:
                raise LoaderError(
                    f"{self._server.url} is not what it was when this loader was made: it has other tokens or another "
                    "model now; make the loader again"
                )
            sizes = [len(self.batches[number]) for number in range(k, k + self._n_here(reply, len(futures)))]
            n_given = 0
            try:
                for batch in (
                    self._read_raw(reply, sizes) if self._is_raw else self._read_named(reply, sizes[0])
                ):
                    for tensor in tensors_of(batch):
                        self._server.count(tensor.nbytes)
                    if not futures[n_given].cancelled():
                        futures[n_given].set_result(batch)
                    n_given += 1
                    if all(future in self._unwanted for future in futures[n_given:]):
                        break  # nobody waits for the rest any more
            except RequestError:
                if not n_given:
                    raise
                # What has come is given already; the rest is requested again.
            return n_given

        return self._server.take(f"/batches/{k}", take, query=query, accept=accept)

    def _n_here(self, reply: http.client.HTTPResponse, n_wanted: int) -> int:
        text = reply.getheader(N_HERE) or "1"
        n = int(text) if text.isdecimal() and len(text) < _MAX_DIGITS else 0
        if not 1 <= n <= n_wanted:
            raise unexpected(f"{self._server.url}/batches", f"{shown(text)} batches", f"1 to {n_wanted}")
        return n

    def _read_raw(self, reply: http.client.HTTPResponse, sizes: list[int]) -> Iterator[Values]:
        hook, where = self.options.hooks[0], f"{self._server.url}/batches"
        dtype, inner = self._kinds[hook]
        shape = (sum(sizes), *inner)
        check_kind(reply, where, dtype, shape)
        check_length(reply, where, math.prod(shape) * getattr(torch, dtype).itemsize)
        for size in sizes:
            yield self._read_tensor(reply, hook, dtype, (size, *inner))

    def _read_named(self, reply: http.client.HTTPResponse, n_rows: int) -> Iterator[Values | Batch]:
        options = self.options
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            hook: (dtype, (n_rows, *inner)) for hook, (dtype, inner) in self._kinds.items()
        }
        if options.provenance:
            expected |= dict.fromkeys(_ORIGIN, ("int64", (n_rows,)))
        tensors = {
            name: self._read_tensor(reply, name, *expected[name])
            for name in read_header(reply, f"{self._server.url}/batches", expected)
        }
        hooks = {hook: tensors[hook] for hook in options.hooks}
        values: Values = hooks[options.hooks[0]] if options.is_single else hooks
        yield Batch(values, *(tensors[name] for name in _ORIGIN)) if options.provenance else values

    def _read_tensor(
        self, reply: http.client.HTTPResponse, name: str, dtype: str, shape: Sequence[int]
    ) -> torch.Tensor:
        """Read a tensor from the socket, into memory that an earlier batch used if there is some."""
        kind = getattr(torch, dtype)
        if name not in self._buffers:
            tensor = torch.empty(tuple(shape), dtype=kind)
        else:
            with self._taking:
                tensor = self._buffers[name].take(tuple(shape), kind)
        if math.prod(shape):
            read_into(reply, tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def _moved(self, batch: Values | Batch) -> Values | Batch:
        """Move a batch to the device, in the thread that requested it."""
        transfer = self._transfer
        if transfer is None:
            return batch
        if isinstance(batch, Batch):
            origin = [
                transfer(tensor, tensor.dtype) for tensor in (batch.sequences, batch.positions, batch.tokens)
            ]
            values = self._moved(batch.values)
            assert not isinstance(values, Batch)
            return Batch(values, *origin)
        if isinstance(batch, dict):
            return {hook: transfer(values, values.dtype) for hook, values in batch.items()}
        return transfer(batch, batch.dtype)

    def hand_over(self, batch: Values | Batch) -> None:
        """Implements `BatchSource.hand_over`."""
        if self._transfer is not None:
            for tensor in all_tensors_of(batch):
                self._transfer.hand_over(tensor)

    def interrupt(self) -> None:
        """Implements `BatchSource.interrupt`; a request that is under way is finished."""
        self._is_interrupted = True

    def resume(self) -> None:
        """Implements `BatchSource.resume`."""
        self._is_interrupted = False

    def close(self) -> None:
        """End the threads, after the requests that are under way, and close the connections."""
        self.interrupt()
        with self._lock:
            for future in self._requested.values():
                self._give_up(future)
            threads, self._threads, self._requested = self._threads, None, {}
            if threads is not None:
                threads.shutdown(cancel_futures=True)
        self._server.connections.close()
        self._is_interrupted = False


def _runs(keys: list[Key]) -> Iterator[list[Key]]:
    """Group the keys of batches into runs that follow each other."""
    start = 0
    for stop in range(1, len(keys) + 1):
        if stop == len(keys) or keys[stop] != (keys[stop - 1][0], keys[stop - 1][1] + 1):
            yield keys[start:stop]
            start = stop


def _query(options: LoaderOptions) -> dict[str, Any]:
    drop = options.drop
    named = {PAD: drop.is_padding_dropped, NONFINITE: drop.is_nonfinite_dropped}
    tokens = [
        *map(str, drop.tokens),
        *drop.roles,
        *(name for name, is_dropped in named.items() if is_dropped),
    ]
    query: dict[str, Any] = {
        "hook": list(options.hooks),
        **{name: getattr(options, name) for name in OPTIONS_AS_THEY_ARE},
        "shuffle": options.shuffle or "none",
        "drop": tokens,
    }
    if drop.positions is not None:
        kept = indices_of(drop.positions, 1 + max(drop.positions, default=0), "seqpos")
        query["seqpos"] = text_of(kept) or "0:0"
    if drop.max_norm is not None:
        query["max_norm"] = drop.max_norm
    if options.dtype is not None:
        query["dtype"] = dtype_name(options.dtype)
    return query

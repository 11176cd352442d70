"""Batches that a server makes."""

import http.client
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.errors import LoaderError, StorageError
from actstore.loader.batch import Batch, Values, all_tensors_of, tensors_of
from actstore.loader.batch_maker import BatchMaker
from actstore.loader.buffers import Buffers
from actstore.loader.drop import valid_rows
from actstore.loader.options import LoaderOptions
from actstore.loader.order import Batches
from actstore.loader.transfer import Transfer
from actstore.loader.valid_rows import ValidRows
from actstore.query.client.connections import read_into
from actstore.query.client.safetensors import read_header
from actstore.query.client.server import Server
from actstore.query.documents import OrderDocument
from actstore.query.selection import listed, text_of
from actstore.query.wire import DTYPE, ORDER, POSITIONS, RAW, SAFETENSORS, SEQUENCES, SHAPE, TOKENS
from actstore.store.storage_errors import Kind, RequestError

if TYPE_CHECKING:
    from actstore.store.store import Store

_AHEAD: Final = 1
"""Batches that are asked for beside the one that is wanted."""
Key = tuple[int, int]
"""Epoch and number of a batch."""
_ORIGIN: Final = (SEQUENCES, POSITIONS, TOKENS)


class ServedBatches:
    """`BatchSource` of a server, which knows the order and what is dropped. Threads take turns."""

    def __init__(self, store: "Store", server: Server, options: LoaderOptions) -> None:
        """
        Args:
            store: of the server.
            server: that makes the batches.
            options: of the loader; without a mask.

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
        self._transfer = None if options.device is None else Transfer(options.device)
        is_pinned = self._transfer is not None and self._transfer.is_pinned
        n_kept = options.prefetch + 3 + _AHEAD
        self._buffers = {hook: Buffers(n_kept, is_pinned=is_pinned) for hook in options.hooks}
        self.begin_process()

    is_local = False
    cache_hits_and_misses = (0, 0)
    known_rows: ValidRows | None = None

    def begin_process(self) -> None:
        """Forget a lock that a thread may have held which is not in a forked process."""
        self._lock = threading.Lock()
        self._taking = threading.Lock()  # threads that take at once could be given the same memory
        self._is_interrupted = False
        self._threads: ThreadPoolExecutor | None = None
        self._asked: dict[Key, Future[Values | Batch]] = {}

    @cached_property
    def rows(self) -> ValidRows:
        """Found here, from the tokens of the store."""
        return valid_rows(self._store, self.options.drop, self.options.hooks[0])

    @property
    def mask_nbytes(self) -> int:
        """The server has it."""
        return 0

    @property
    def n_retries(self) -> int:
        """Requests that were repeated."""
        return self._server.n_retries

    @property
    def nbytes_read(self) -> int:
        """Bytes of batches, until now."""
        return self._server.nbytes_read

    def identity(self) -> dict[str, Any]:
        """As `BatchSource.identity`."""
        return dict(self._identity)

    def places(self, epoch: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `BatchSource.places`; computed here, as a loader that reads storage does."""
        return self._order.places(epoch, k)

    @cached_property
    def _order(self) -> BatchMaker:
        """Of which nothing but the numbers of rows is asked for."""
        return BatchMaker(self._store, self.options, self.rows)

    def __call__(self, epoch: int, k: int) -> Values | Batch:
        """As `BatchSource`.

        Raises:
            LoaderError: it was interrupted.
        """
        self.batches[k]  # or it is an IndexError
        with self._lock:
            if self._is_interrupted:
                raise LoaderError("the loader was closed, or begins elsewhere; ask for the batch again")
            if not self.options.prefetch:
                return self._moved(self._fetched(epoch, k))
            wanted = self._following(epoch, k)
            for key in self._asked.keys() - set(wanted):
                self._asked.pop(key).cancel()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(1 + _AHEAD, thread_name_prefix="batches")
            for key in wanted:
                asked = self._asked.get(key)
                has_failed = asked is not None and asked.done() and asked.exception() is not None
                if asked is None or has_failed:
                    self._asked[key] = self._threads.submit(self._fetched, *key)
            return self._moved(self._asked.pop((epoch, k)).result())

    def _following(self, epoch: int, k: int) -> list[Key]:
        """A batch, and those that are asked for before it is here: the server makes them while it is on its way."""
        found, epochs = [(epoch, k)], self.options.epochs
        for _ in range(_AHEAD):
            epoch, k = (epoch, k + 1) if k + 1 < self.batches.n_batches else (epoch + 1, 0)
            if epochs is None or epoch < epochs:
                found.append((epoch, k))
        return found

    def _fetched(self, epoch: int, k: int) -> Values | Batch:
        is_raw = self.options.is_single and not self.options.provenance
        take = self._take_raw if is_raw else self._take_named
        accept = RAW if is_raw else SAFETENSORS
        query = {**self._query, "epoch": epoch}

        def checked(reply: http.client.HTTPResponse) -> Values | Batch:
            if reply.getheader(ORDER) != self._version:
                raise LoaderError(
                    f"{self._server.url} is not what it was when this loader was made: it has other tokens or another "
                    "model by now; make the loader anew"
                )
            return take(reply)

        found = self._server.take(f"/batches/{k}", checked, query=query, accept=accept)
        n_rows = len(self.batches[k])
        for tensor in tensors_of(found):
            if len(tensor) != n_rows:
                raise StorageError(
                    f"{self._server.url} gave {len(tensor)} rows where batch {k} has {n_rows}; it is another server"
                )
            self._server.count(tensor.nbytes)
        return found

    def _take_raw(self, reply: http.client.HTTPResponse) -> Values | Batch:
        shape = tuple(int(size) for size in (reply.getheader(SHAPE) or "").split(",") if size)
        return self._filled(reply, self.options.hooks[0], reply.getheader(DTYPE) or "", shape)

    def _take_named(self, reply: http.client.HTTPResponse) -> Values | Batch:
        found = {}
        for name, (dtype, shape) in read_header(reply).items():
            found[name] = self._filled(reply, name, dtype, shape)
        options = self.options
        if not {*options.hooks, *(_ORIGIN if options.provenance else ())} <= found.keys():
            raise RequestError(
                Kind.OTHER, f"the batch has {', '.join(found)}, which is not what was asked for"
            )
        hooks = {hook: found[hook] for hook in options.hooks}
        values: Values = hooks[options.hooks[0]] if options.is_single else hooks
        return Batch(values, *(found[name] for name in _ORIGIN)) if options.provenance else values

    def _filled(
        self, reply: http.client.HTTPResponse, name: str, dtype: str, shape: Sequence[int]
    ) -> torch.Tensor:
        """Memory that was used before, filled from the socket."""
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or not shape:
            raise RequestError(Kind.OTHER, f"a batch of type {dtype!r} and shape {list(shape)} came")
        if name not in self._buffers:
            found = torch.empty(tuple(shape), dtype=kind)
        else:
            with self._taking:
                found = self._buffers[name].take(tuple(shape), kind)
        if math.prod(shape):
            read_into(reply, found.view(-1).view(torch.uint8).numpy())
        return found

    def _moved(self, batch: Values | Batch) -> Values | Batch:
        """To the device, in the thread that asked."""
        transfer = self._transfer
        if transfer is None:
            return batch
        if isinstance(batch, Batch):
            origin = [transfer(each, each.dtype) for each in (batch.sequences, batch.positions, batch.tokens)]
            values = self._moved(batch.values)
            assert not isinstance(values, Batch)
            return Batch(values, *origin)
        if isinstance(batch, dict):
            return {hook: transfer(values, values.dtype) for hook, values in batch.items()}
        return transfer(batch, batch.dtype)

    def hand_over(self, batch: Values | Batch) -> None:
        """As `BatchSource.hand_over`."""
        if self._transfer is not None:
            for tensor in all_tensors_of(batch):
                self._transfer.hand_over(tensor)

    def interrupt(self) -> None:
        """As `BatchSource.interrupt`; a request that is under way is finished."""
        self._is_interrupted = True

    def resume(self) -> None:
        """As `BatchSource.resume`."""
        self._is_interrupted = False

    def close(self) -> None:
        """End the threads, after the requests that are under way, and close the connections."""
        self.interrupt()
        with self._lock:
            threads, self._threads, self._asked = self._threads, None, {}
            if threads is not None:
                threads.shutdown(cancel_futures=True)
        self._server.connections.close()
        self._is_interrupted = False


def _query(options: LoaderOptions) -> dict[str, Any]:
    drop = options.drop
    tokens = [*map(str, drop.tokens), *(["pad"] if drop.is_padding_dropped else [])]
    found: dict[str, Any] = {
        "hook": list(options.hooks),
        "batch_size": options.batch_size,
        "seed": options.seed,
        "shuffle": options.shuffle or "none",
        "window_rows": options.window_rows,
        "drop": tokens,
        "drop_last": options.drop_last,
        "rank": options.rank,
        "world_size": options.world_size,
        "provenance": options.provenance,
    }
    if drop.positions is not None:
        kept = listed(drop.positions, 1 + max(drop.positions, default=0), "seqpos")
        found["seqpos"] = text_of(kept) or "0:0"
    if drop.max_norm is not None:
        found["max_norm"] = drop.max_norm
    if options.dtype is not None:
        found["dtype"] = str(options.dtype).removeprefix("torch.")
    return found

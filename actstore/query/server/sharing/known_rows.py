"""Finds which rows of a store are left when some are dropped, once for all orders that drop the same."""

import threading
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from actstore.loader.batches.footprint import finding_nbytes
from actstore.loader.dropping.drop import Drop, valid_rows
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions
from actstore.query.server.memory.budget import Account, MemoryBudget
from actstore.query.server.sharing.scans import Look, StoppedError
from actstore.store.committed_store import CommittedStore

Mask = NDArray[np.bool_]


class KnownRows:
    """Rows of the orders that exist, and the results of stopped scans. Threads may share it."""

    def __init__(self, budget: MemoryBudget) -> None:
        """
        Args:
            budget: memory budget of the process.
        """
        self._budget = budget
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[Hashable, ValidRows] = weakref.WeakValueDictionary()
        self._scans: dict[Hashable, RowScan] = {}

    def find(
        self, store: CommittedStore, options: LoaderOptions, client: str
    ) -> "ValidRows | RowScan | None":
        """The rows; or the scan that finds them; or None, where nothing must be read to know them.

        Raises:
            Problem: finding them takes more memory than a client may have.
        """
        drop = options.drop
        if not drop.looks_at_rows(store.entries):
            return None
        hooks = options.hooks if drop.is_nonfinite_dropped else options.hooks[:1]
        key = (id(store), drop, hooks)
        with self._lock:
            known = self._known.get(key) or self._scans.get(key)
            if known is None:
                nbytes = finding_nbytes(store, drop, hooks)
                self._budget.check(
                    nbytes, "to find the rows of this order takes", "start the server with a larger --memory"
                )
                known = RowScan(self, key, store, drop, hooks, client, nbytes)
            return known

    def begin(self, scan: "RowScan", progress: "_Progress", nbytes: int) -> Account:
        """Take memory for a scan, and keep the scan for others from now on.

        Raises:
            Problem: there is no memory for it now.
        """
        account = self._budget.account(scan.client, partial(self._give_up, scan, progress))
        try:
            account.grow(nbytes, nbytes)
        except BaseException:
            account.close()
            raise
        with self._lock:
            self._scans[scan.key] = scan
        return account

    def _give_up(self, scan: "RowScan", progress: "_Progress") -> None:
        self.forget(scan)
        progress.pieces.clear()
        progress.masks = None
        if progress.account is not None:
            progress.account.close()

    def forget(self, scan: "RowScan", rows: ValidRows | None = None) -> None:
        """Forget a scan that has ended, and keep its rows, if it was not for an error."""
        with self._lock:
            if self._scans.get(scan.key) is scan:
                del self._scans[scan.key]
            if rows is not None:
                self._known[scan.key] = rows


@dataclass
class _Progress:
    """Results of a scan so far. Their memory can be given up while the scan is stopped."""

    account: Account | None = None
    masks: Iterator[Mask] | None = None
    """Iterator that goes on where the scan was stopped."""
    pieces: list[tuple[NDArray[np.uint8], tuple[int, ...]]] = field(default_factory=list)
    """Packed bits and shape of each piece of the mask."""


class RowScan:
    """A scan over all rows that can be stopped, and goes on where it was."""

    def __init__(
        self,
        known: KnownRows,
        key: Hashable,
        store: CommittedStore,
        drop: Drop,
        hooks: tuple[str, ...],
        client: str,
        nbytes: int,
    ) -> None:
        """
        Args:
            known: takes the rows at the end.
            key: equal for scans that find the same rows.
            store: store with the rows.
            drop: rows that are dropped.
            hooks: hooks of the loader.
            client: client in whose share the memory counts.
            nbytes: bytes of memory that the scan takes.
        """
        self._known = known
        self.key = key
        self._store = store
        self._drop = drop
        self._hooks = hooks
        self.client = client
        self._nbytes = nbytes
        self._progress = _Progress()
        self._turn = threading.Lock()

    def __call__(self, look: Look) -> ValidRows:
        """Find the rows.

        Raises:
            LoaderError: no rows are left.
            Problem: there is no memory for it now.
            StoppedError: nobody waits for the rows.
            StorageError: the store cannot be read.
        """
        with self._turn:  # a scan that is being stopped goes on to the end of a piece
            account = self._account()
            try:
                rows = valid_rows(
                    self._store, self._drop, self._hooks, watch=partial(self._watch, self._progress, look)
                )
            except StoppedError:
                account.leave()
                raise
            except BaseException:
                self._known.forget(self)
                account.close()
                raise
            self._progress = _Progress()
            account.shrink(self._nbytes - rows.nbytes, self._nbytes)
            weakref.finalize(rows, account.close).atexit = False
            self._known.forget(self, rows)
            return rows

    def _account(self) -> Account:
        account = self._progress.account
        if account is None or not account.use(self.client):
            self._progress = _Progress()
            account = self._progress.account = self._known.begin(self, self._progress, self._nbytes)
        return account

    def _watch(self, progress: _Progress, look: Look, masks: Iterator[Mask]) -> Iterator[Mask]:
        if progress.masks is None:
            progress.masks = masks
        for bits, shape in progress.pieces:
            yield np.unpackbits(bits, count=int(np.prod(shape)), bitorder="little").view(bool).reshape(shape)
        for mask in progress.masks:
            progress.pieces.append((np.packbits(mask, bitorder="little"), mask.shape))
            yield mask
            look(mask.size)

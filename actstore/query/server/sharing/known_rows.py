"""Which rows of a store are left when some are dropped: looked for once for all orders that drop the same."""

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
    """Those of the orders that are there, and what was found by scans that were stopped. Threads may share it."""

    def __init__(self, budget: MemoryBudget) -> None:
        """
        Args:
            budget: of the process.
        """
        self._budget = budget
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[Hashable, ValidRows] = weakref.WeakValueDictionary()
        self._scans: dict[Hashable, RowScan] = {}

    def find(
        self, store: CommittedStore, options: LoaderOptions, client: str
    ) -> "ValidRows | RowScan | None":
        """The rows; or what finds them; or None, where nothing must be read for that.

        Raises:
            Problem: to find them takes more memory than a client may have.
        """
        drop = options.drop
        if not drop.looks_at_rows:
            return None
        hooks = options.hooks if drop.is_nonfinite_dropped else options.hooks[:1]
        key = (id(store), drop, hooks)
        with self._lock:
            found = self._known.get(key) or self._scans.get(key)
            if found is None:
                nbytes = finding_nbytes(store, drop, hooks)
                self._budget.check(
                    nbytes, "to find the rows of this order takes", "start the server with a larger --memory"
                )
                found = RowScan(self, key, store, drop, hooks, client, nbytes)
            return found

    def begin(self, scan: "RowScan", progress: "_Progress", nbytes: int) -> Account:
        """Memory for a scan, which is found from now on.

        Raises:
            Problem: there is none for it now.
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
        progress.found.clear()
        progress.masks = None
        if progress.account is not None:
            progress.account.close()

    def forget(self, scan: "RowScan", rows: ValidRows | None = None) -> None:
        """A scan has ended; with these rows, if it was not for an error."""
        with self._lock:
            if self._scans.get(scan.key) is scan:
                del self._scans[scan.key]
            if rows is not None:
                self._known[scan.key] = rows


@dataclass
class _Progress:
    """What is found already. Others may have its memory while nobody goes on with it."""

    account: Account | None = None
    masks: Iterator[Mask] | None = None
    """Goes on where it was stopped."""
    found: list[tuple[NDArray[np.uint8], tuple[int, ...]]] = field(default_factory=list)
    """Bits of each piece, and its shape."""


class RowScan:
    """A look at all rows, which can be stopped, and goes on where it was."""

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
            known: told what was found.
            key: the same for the same rows.
            store: whose rows they are.
            drop: what is left out.
            hooks: of the loader.
            client: whose share the memory is of.
            nbytes: that it takes.
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
        """The rows.

        Raises:
            LoaderError: none are left.
            Problem: there is no memory for it now.
            StoppedError: nobody waits for them.
            StorageError: what must be read cannot be.
        """
        with self._turn:  # one that is being stopped goes on to the end of a piece
            account = self._account()
            try:
                rows = valid_rows(
                    self._store, self._drop, self._hooks, watch=partial(self._watched, self._progress, look)
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

    def _watched(self, progress: _Progress, look: Look, masks: Iterator[Mask]) -> Iterator[Mask]:
        if progress.masks is None:
            progress.masks = masks
        for bits, shape in progress.found:
            yield np.unpackbits(bits, count=int(np.prod(shape)), bitorder="little").view(bool).reshape(shape)
        for mask in progress.masks:
            progress.found.append((np.packbits(mask, bitorder="little"), mask.shape))
            yield mask
            look(mask.size)

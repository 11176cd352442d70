"""The batches of a store as a torch dataset, with or without worker processes."""

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Unpack

from torch.utils.data import IterableDataset, get_worker_info

from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.loader.arguments import LoaderArguments
from actstore.loader.batches.batch import Batch, Values
from actstore.opening import open_store

if TYPE_CHECKING:
    from actstore.pairing import Hooks


class ActivationDataset(IterableDataset[Values | Batch]):
    """Whole batches in the order of a loader with the same options; use it with ``batch_size=None``::

        DataLoader(ActivationDataset(url, hook, batch_size=4096), batch_size=None, num_workers=2)

    Worker w of W makes batches w, w + W, ... of all epochs. The DataLoader takes one from each worker in turn, which
    restores the order of the loader. Each worker opens the store itself. A loader has a thread that reads ahead, so
    workers help only if one thread is too slow; with ``shuffle="window"`` each of them reads every window.

    Iterating again gives the same batches again, unless `start_at` was called.
    """

    def __init__(self, store: Store | str, hooks: "Hooks", **options: Unpack[LoaderArguments]) -> None:
        """
        Args:
            store: a store, or its path or URL.
            hooks: as for `Store.loader`.
            options: as for `Store.loader`.

        Raises:
            HookError: a hook is not stored.
            LoaderError: an option has an impossible value, or no row is left.
            NotCommittedError: a row is not committed.
            StorageError: something cannot be read.
        """
        super().__init__()
        opened = open_store(store) if isinstance(store, str) else store
        with opened.loader(hooks, **options) as loader:
            self.n_batches = loader.n_batches
            """Number of batches of an epoch."""
            self._options, self._rows = loader.options, loader.known_rows
        self._store = opened
        self._is_local = opened.tokens.blobs.is_local
        self._start = (0, 0)
        self._process = os.getpid()

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Begin every later iteration at this batch. Workers that are kept (``persistent_workers``) do not notice.

        Raises:
            LoaderError: there is no such batch.
        """
        epochs = self._options.epochs
        if epoch < 0 or (epochs is not None and epoch >= epochs) or not 0 <= batch < self.n_batches:
            raise LoaderError(
                f"there is no batch {batch} of epoch {epoch}; there are {self.n_batches} batches and "
                f"{'endless' if epochs is None else epochs} epochs"
            )
        self._start = (epoch, batch)

    def __iter__(self) -> Iterator[Values | Batch]:
        """Iterate over the batches of this worker, or over all without workers.

        Raises:
            LoaderError: this is a forked process, and the store is not on a local disk.
            StorageError: the store, or rows of it, cannot be read.
        """
        if self._process != os.getpid() and not self._is_local:
            raise LoaderError(
                f"{self._store.url} is not on a local disk, and its connections do not survive a fork; give the "
                "DataLoader multiprocessing_context='spawn', or num_workers=0"
            )
        worker = get_worker_info()
        with self._store.reopened().loader_of(self._options, self._rows) as loader:
            epoch, batch = self._start
            if worker is None:
                loader.seek(epoch, batch)
                yield from loader
                return
            first = epoch * self.n_batches + batch + worker.id
            epochs = self._options.epochs
            for number in itertools.count(first, worker.num_workers):
                epoch, k = divmod(number, self.n_batches)
                if epochs is not None and epoch >= epochs:
                    return
                yield loader.batch(k, epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A process that unpickled this object has opened nothing yet, unlike a forked one.
        self.__dict__.update(state)
        self._process = os.getpid()

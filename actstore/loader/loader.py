"""The loader: batches of rows from a store."""

import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.closing import Closing
from actstore.errors import LoaderError, NotCommittedError
from actstore.loader.batches.batch import Batch, Values
from actstore.loader.batches.batch_maker import BatchMaker
from actstore.loader.batches.batch_source import BatchSource
from actstore.loader.dropping.finite import warn_of_not_finite
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.metrics import Counts, Metrics
from actstore.loader.options import LoaderOptions
from actstore.loader.prefetch import Prefetch
from actstore.store.reading.identity import contents_of, is_same_contents

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

MakesSource = Callable[[LoaderOptions, ValidRows | None], BatchSource]
_STATE_VERSION: Final = 1


class Loader(Closing):
    """An iterator over batches, seeded, and resumable from the number of the next one. Get it from `Store.loader`.

    A batch is [n_rows, *shape of the hook] in the stored type, or a dict of these by hook, or a `Batch`.
    """

    def __init__(
        self,
        store: "CommittedStore",
        options: LoaderOptions,
        rows: ValidRows | None = None,
        *,
        make: MakesSource | None = None,
    ) -> None:
        """
        Args:
            store: the store that the rows are in.
            options: the options, which decide which rows there are, and in which order.
            rows: the rows that are not dropped; None finds them, which can take long.
            make: opens the source of batches; None reads them from the store. It is
                pickled with the loader.
        """
        _check_complete(store, options.hooks)
        warn_of_not_finite(store, options.hooks, options.drop)
        self.store = store
        self.options = options
        self._make_source = make
        self._make: BatchSource = BatchMaker(store, options, rows) if make is None else make(options, rows)
        runs = [run for run in store.runs if any(run.hook(hook) is not None for hook in options.hooks)]
        self._identity: dict[str, Any] = {"hooks": list(options.hooks), "contents": contents_of(runs)}
        """The hooks and contents that the values are of, as part of the state."""
        self._epoch = self._k = 0
        self._ahead: Prefetch[_Made] | None = None
        self._process = os.getpid()
        self._counts = Counts()

    @property
    def n_rows(self) -> int:
        """Number of rows of an epoch that are not dropped, all ranks together."""
        return self._make.batches.n_places

    @property
    def n_batches(self) -> int:
        """Number of batches of an epoch."""
        return self._make.batches.n_batches

    @property
    def known_rows(self) -> ValidRows | None:
        """The rows that are not dropped, or None if only a server knows them."""
        return self._make.known_rows

    @property
    def valid_rows(self) -> ValidRows:
        """The rows of the store that are not dropped; the same for all ranks."""
        return self._make.rows

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._epoch

    @property
    def place(self) -> tuple[int, int]:
        """(epoch of the next batch, its number in the epoch)."""
        return self._epoch, self._k

    def seek(self, epoch: int, k: int = 0) -> None:
        """Continue at any batch; this takes no longer than starting at the first.

        Raises:
            LoaderError: there is no such batch.
        """
        epochs = self.options.epochs
        if epoch < 0 or not 0 <= k <= self.n_batches or (epochs is not None and (epoch, k) > (epochs, 0)):
            raise LoaderError(
                f"there is no batch {k} of epoch {epoch}; there are {self.n_batches} batches and "
                f"{'endless' if epochs is None else epochs} epochs"
            )
        self._stop_ahead()
        self._epoch, self._k = self._place(epoch, k)

    def batch(self, k: int, epoch: int = 0) -> Any:
        """Make any batch. The state of the iteration does not change.

        Raises:
            IndexError: an epoch has fewer batches.
            LoaderError: meanwhile another thread closed the loader or loaded a state.
            StorageError: rows cannot be read.
        """
        self._check_process()
        made = self._make(epoch, k)
        self._make.hand_over(made)
        return made

    def rows(self, k: int, epoch: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequences and positions of the rows of any batch, both [n_rows]. No activations are read."""
        sequences, entries = self._make.places(epoch, k)
        return sequences, self.store.entries.positions_at(sequences, entries)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """The next batch. It belongs to the caller: its memory is not reused while it, or a view of it, is held.

        Raises:
            StopIteration: all epochs are over.
            StorageError: rows cannot be read. The next call tries the same batch again.
        """
        self._check_process()
        started = time.perf_counter()
        if self.options.prefetch and self._ahead is None:
            self._ahead = Prefetch(self._from_here(), self.options.prefetch, self._make.interrupt)
        try:
            made = next(self._ahead if self._ahead is not None else self._from_here())
            self._make.hand_over(made.batch)
        except BaseException:
            # Also if the caller is interrupted: batches that were taken from the queue are made again.
            self._stop_ahead()
            raise
        self._epoch, self._k = self._place(made.epoch, made.k + 1)
        self._counts.add(made.batch, made.seconds, time.perf_counter() - started)
        return made.batch

    def _place(self, epoch: int, k: int) -> tuple[int, int]:
        """(epoch, number) of a batch; the one behind the last of an epoch is the first of the next."""
        return (epoch + 1, 0) if k == self.n_batches else (epoch, k)

    def _from_here(self) -> "Iterator[_Made]":
        return _made(self._make, self._epoch, self._k)

    def _check_process(self) -> None:
        """Start anew in a forked process, which has none of the threads and shares connections with its parent.

        OpenMP would wait for threads that the fork did not copy, so torch is limited to one.
        """
        if self._process == os.getpid():
            return
        if not self._make.is_local:
            raise LoaderError(
                f"this loader of {self.store.url} was made in another process, and connections cannot be used by "
                "both; start processes with the method 'spawn', or make the loader in the process that uses it"
            )
        self._begin_process()
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)

    def _begin_process(self) -> None:
        self._process, self._ahead = os.getpid(), None
        self._make.begin_process()

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, with the order, hooks and store that it belongs to, as plain data for JSON.
        Batches that were made ahead and not taken do not count.
        """
        return {
            "version": _STATE_VERSION,
            "epoch": self._epoch,
            "batch": self._k,
            "order": self._make.identity(),
            "loaders": [self._identity],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another loader was, with any number of ranks; this takes no longer than starting at the first
        batch.

        Raises:
            LoaderError: this is not the state of a loader, or it has another order, other rows, other hooks or another
                store.
        """
        try:
            version, epoch, k = (operator.index(state[name]) for name in ("version", "epoch", "batch"))
            order = dict(state["order"])
        except (KeyError, TypeError, ValueError) as error:
            raise LoaderError(
                f"{state!r} is not the state of a loader; give the result of state_dict()"
            ) from error
        if version != _STATE_VERSION:
            raise LoaderError(
                f"the state has version {version}, and this release of actstore knows {_STATE_VERSION}; continue with "
                "the release that made it, or start over"
            )
        ours = self._make.identity()
        if (
            any(order.get(name) != ours[name] for name in ("rows", "n_rows"))
            and order.get("tokens") == ours["tokens"]
        ):
            raise LoaderError(
                f"the state is of a loader that drops other rows: {order.get('n_rows')} of them were left, and "
                f"{ours['n_rows']} are here; give drop, seqpos, max_norm and mask as they were, or start over"
            )
        if order.get("tokens") != ours["tokens"]:
            raise LoaderError(
                f"the state is of other tokens than those of {self.store.url}: of another store, or from before some "
                "were added; make a loader of that store, or start over"
            )
        for name, value in ours.items():
            if order.get(name) != value:
                raise LoaderError(
                    f"the state is of a loader with {name} {order.get(name)!r}, and this one has {value!r}; make the "
                    "loader as it was, or start over"
                )
        self._check_values(state.get("loaders"))
        self.seek(epoch, k)

    def _check_values(self, loaders: Any) -> None:
        """Check that a state belongs to a loader of the same hooks and contents.

        Args:
            loaders: the hooks and contents of the loaders of the state; None in states of earlier releases.

        Raises:
            LoaderError: the state belongs to no such loader.
        """
        if loaders is None:
            return
        try:
            known = [(sorted(loader["hooks"]), list(loader["contents"])) for loader in loaders]
        except (KeyError, TypeError) as error:
            raise LoaderError(
                f"{loaders!r} is not part of a state; give the result of state_dict()"
            ) from error
        ours = [contents for hooks, contents in known if hooks == sorted(self.options.hooks)]
        if not ours:
            theirs = " or ".join(", ".join(hooks) for hooks, _ in known)
            raise LoaderError(
                f"the state is of a loader of {theirs}, and this one is of {', '.join(self.options.hooks)}; make the "
                "loader as it was, or start over"
            )
        if not any(is_same_contents(contents, self._identity["contents"]) for contents in ours):
            raise LoaderError(
                f"the state is of a loader of another store than {self.store.url}, with another plan or other values; "
                "open the store that it is of, or start over"
            )

    def metrics(self) -> Metrics:
        """What was counted so far."""
        return self._counts.metrics(
            n_ready=0 if self._ahead is None else self._ahead.n_ready,
            n_retries=self._make.n_retries,
            nbytes_read=self._make.nbytes_read,
            cache_hits_and_misses=self._make.cache_hits_and_misses,
            mask_nbytes=self._make.mask_nbytes,
        )

    def close(self) -> None:
        """End the threads, after the requests under way, and unmap files. The loader can be used again."""
        if self._process != os.getpid():
            self._begin_process()  # the threads and files are those of the parent process
            return
        try:
            self._stop_ahead()
        finally:
            self._make.close()

    def _stop_ahead(self) -> None:
        # Cleared first: if waiting is interrupted, no later call may meet a closed queue.
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            try:
                ahead.close()
            finally:
                self._make.resume()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (
            self.store,
            self.options,
            self._make.known_rows,
            self._make_source,
            self.state_dict(),
        )

    def __repr__(self) -> str:
        hooks = ", ".join(self.options.hooks)
        return (
            f"<Loader {hooks} of {self.store.url}: {self.n_rows} rows, {self.n_batches} batches of "
            f"{self.options.batch_size}, at batch {self._k} of epoch {self._epoch}>"
        )


def _check_complete(store: "CommittedStore", hooks: Sequence[str]) -> None:
    """Check that the hooks are complete; others may still be extracted."""
    try:
        for hook in () if store.is_complete else hooks:
            store[hook].rows.check_committed()
    except NotCommittedError as error:
        raise LoaderError(
            f"{store.url} is not complete ({store.n_committed} of {store.n_segments} segments), and the order of "
            "rows depends on how many there are; run the extraction again to complete it"
        ) from error


@dataclass(frozen=True)
class _Made:
    epoch: int
    k: int
    batch: Values | Batch
    seconds: float


def _made(make: BatchSource, epoch: int, k: int) -> Iterator[_Made]:
    """All remaining batches. The thread that makes them does not hold the loader, so the loader can be garbage
    collected.
    """
    epochs = make.options.epochs
    while epochs is None or epoch < epochs:
        for number in range(k, make.batches.n_batches):
            started = time.perf_counter()
            batch = make(epoch, number)
            yield _Made(epoch, number, batch, time.perf_counter() - started)
        epoch, k = epoch + 1, 0


def _reopened(
    store: "CommittedStore",
    options: LoaderOptions,
    rows: ValidRows | None,
    make: MakesSource | None,
    state: dict[str, Any],
) -> Loader:
    loader = Loader(store, options, rows, make=make)
    loader.load_state_dict(state)
    return loader

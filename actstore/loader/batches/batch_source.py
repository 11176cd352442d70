"""The interface through which a loader gets its batches."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.loader.batches.batch import Batch, Values
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions
from actstore.loader.ordering.order import Batches


class BatchSource(Protocol):
    """Gives any batch by its number. Threads take turns."""

    options: LoaderOptions
    batches: Batches

    @property
    def rows(self) -> ValidRows:
        """The rows that are not dropped. Finding them can take long."""

    @property
    def known_rows(self) -> ValidRows | None:
        """The rows that are not dropped, or None if they would have to be found first."""

    @property
    def mask_nbytes(self) -> int:
        """Bytes of memory that the rows take."""

    @property
    def is_local(self) -> bool:
        """Whether only local files are read."""

    @property
    def n_retries(self) -> int:
        """Number of requests that were repeated."""

    @property
    def nbytes_read(self) -> int:
        """Bytes that were read so far."""

    @property
    def cache_hits_and_misses(self) -> tuple[int, int]:
        """(reads of shards that were in the disk cache, shards that had to be fetched)."""

    def __call__(self, epoch: int, k: int) -> Values | Batch:
        """Make a batch.

        Raises:
            IndexError: an epoch has fewer batches.
            StorageError: rows cannot be read.
        """

    def places(self, epoch: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequences and entries of the rows of a batch. No row is read."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides which rows are in batch k, except the ranks."""

    def hand_over(self, batch: Values | Batch) -> None:
        """Called by the thread that is about to use a batch."""

    def interrupt(self) -> None:
        """Make a waiting thread give up its batch."""

    def resume(self) -> None:
        """Allow batches to be made again."""

    def begin_process(self) -> None:
        """Forget what a forked process does not have."""

    def close(self) -> None:
        """Release memory, files and connections."""

"""Where a loader has its batches from."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.loader.batches.batch import Batch, Values
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions
from actstore.loader.ordering.order import Batches


class BatchSource(Protocol):
    """Gives any batch from its number. Threads take turns."""

    options: LoaderOptions
    batches: Batches

    @property
    def rows(self) -> ValidRows:
        """Those that are not dropped; to find them can take long."""

    @property
    def known_rows(self) -> ValidRows | None:
        """The same, where it takes nothing."""

    @property
    def mask_nbytes(self) -> int:
        """Memory that knowing them takes."""

    @property
    def is_local(self) -> bool:
        """Whether nothing but files is read."""

    @property
    def n_retries(self) -> int:
        """Requests that were repeated."""

    @property
    def nbytes_read(self) -> int:
        """Until now."""

    @property
    def cache_hits_and_misses(self) -> tuple[int, int]:
        """Of a cache on disk."""

    def __call__(self, epoch: int, k: int) -> Values | Batch:
        """A batch.

        Raises:
            IndexError: an epoch has fewer batches.
            StorageError: rows cannot be read.
        """

    def places(self, epoch: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequences and positions of the rows of a batch; none of them is read."""

    def identity(self) -> dict[str, Any]:
        """All that decides which rows are in batch k, but for the ranks."""

    def hand_over(self, batch: Values | Batch) -> None:
        """Told by the thread that will use a batch."""

    def interrupt(self) -> None:
        """Have a thread that waits give up the batch that it makes."""

    def resume(self) -> None:
        """Make batches again."""

    def begin_process(self) -> None:
        """Forget what is not in a forked process."""

    def close(self) -> None:
        """Give back what is held."""

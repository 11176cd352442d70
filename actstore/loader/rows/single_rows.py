"""Rows that are read one by one, where files cannot be mapped."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.loader.ordering.order import Window
from actstore.store.reading.rows import Rows

if TYPE_CHECKING:
    import torch


class SingleRows:
    """A `RowSource` that reads each row by itself: slow, but it works with any storage."""

    def __init__(self, rows: Rows, n_threads: int) -> None:
        """
        Args:
            rows: the array, not compressed.
            n_threads: the number of reads at once.
        """
        self._rows = rows
        self._blobs = rows.blobs
        self._layouts = rows.layouts
        self._length = rows.shape[1]
        self._ends = np.cumsum([layout.shape[0] * self._length for layout in self._layouts])
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="row")

    def gather(self, rows: NDArray[np.int64], out: "torch.Tensor") -> None:
        """Like `RowSource.gather`."""
        memory: NDArray[Any] = out.numpy()
        nbytes = memory.shape[1]
        sections = np.searchsorted(self._ends, rows, side="right")

        def read(place: int) -> None:
            layout = self._layouts[sections[place]]
            row = int(rows[place] - self._ends[sections[place]]) + layout.shape[0] * self._length
            shard, within = divmod(row, layout.shard_rows * self._length)
            self._rows.check_first_use([(int(sections[place]), shard)])
            self._blobs.read_into(layout.key(shard), within * nbytes, memory[place])

        # Sorted by file, so that neighbours are read together.
        for _ in self._threads.map(read, np.argsort(rows).tolist()):
            pass

    def need(self, windows: Sequence[Window], ahead: Window | None) -> None:
        """Do nothing: rows are read when they are gathered."""

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

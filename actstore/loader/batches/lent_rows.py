"""Rows of a batch that are left in their files, for a reader that can take them from there."""

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from actstore.loader.options import LoaderOptions
from actstore.loader.rows.address_range import AddressRange
from actstore.store.reading.rows import Rows

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore


_LEAST_NBYTES: Final = 1024
"""Bytes of the smallest row that is lent: the system copies smaller ones one by one more slowly than they are gathered.
"""


class LentRows:
    """Rows of mapped files, which stay mapped as long as this object or a part of it exists."""

    def __init__(self, source: AddressRange, numbers: NDArray[np.int64]) -> None:
        """
        Args:
            source: the files of the rows. Closing it no longer unmaps them; the last object that lends rows does.
            numbers: the numbers of the rows, in the order of the batch.
        """
        source.lend()
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, rows: slice) -> "LentRows":
        return LentRows(self._source, self._numbers[rows])

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self._source.row_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return len(self) * self.row_nbytes

    def addresses(self) -> NDArray[np.uint64]:
        """The address of each row in this process, [n_rows]. What was read from there is valid if `check` does not
        raise afterwards.
        """
        return self._source.addresses(self._numbers)

    def fetch(self) -> None:
        """Make the system read the rows into memory, so that the next reader does not wait for a disk."""
        self._source.touch(self._numbers)

    def check(self) -> None:
        """Check the files of the rows.

        Raises:
            StorageError: a file has become shorter since it was mapped, or is not what was committed.
        """
        self._source.check(self._numbers)

    def copied(self) -> NDArray[np.uint8]:
        """A copy of the rows, [n_rows, row_nbytes].

        Raises:
            StorageError: a file has become shorter since it was mapped, or is not what was committed.
        """
        import torch

        out = torch.empty(len(self), self.row_nbytes, dtype=torch.uint8)
        self._source.gather(self._numbers, out)
        copied: NDArray[np.uint8] = out.numpy()
        return copied


def can_lend(store: "CommittedStore", options: LoaderOptions) -> bool:
    """Whether all rows of a batch lie in files of this machine exactly as they are wanted, and are long enough to be
    sent from there.
    """
    if options.provenance or options.device is not None:
        return False
    arrays = [store[hook] for hook in options.hooks]
    if any(options.dtype not in (None, array.dtype) for array in arrays):
        return False
    return all(_is_lendable(array.rows) for array in arrays)


def _is_lendable(rows: Rows) -> bool:
    row_nbytes = rows.layouts[0].row_nbytes // rows.shape[1]
    return rows.blobs.is_local and row_nbytes >= _LEAST_NBYTES and AddressRange.fits(rows.layouts)

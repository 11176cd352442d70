"""Which way of reading rows fits an array, where it lies, and an order."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.loader.address_range import AddressRange
from actstore.loader.row_source import RowSource
from actstore.loader.single_rows import SingleRows
from actstore.loader.window_rows import WindowRows
from actstore.store.layout import ArrayLayout
from actstore.store.local import LocalBlobs
from actstore.store.rows import Rows

_READS: Final = 8
"""Of single rows at once, where files cannot be mapped."""


def source_of(rows: Rows, edges: NDArray[np.int64], *, has_windows: bool) -> RowSource:
    """Files that can be mapped are; else windows are read, if the order has them.

    Args:
        rows: the array, all of it committed.
        edges: see `shard_edges`.
        has_windows: whether the order takes rows from a few shards at a time.

    Raises:
        LoaderError: rows from anywhere are asked for, and single rows cannot be read here.
        NotCommittedError: a row is not there.
        StorageError: a shard is missing or has another size than it must.
    """
    rows.check_committed()
    if isinstance(rows.blobs, LocalBlobs) and AddressRange.fits(rows.layouts):
        return AddressRange(rows.blobs, rows.layouts)
    if has_windows:
        return WindowRows(rows, edges)
    if any(layout.compression is not None for layout in rows.layouts):
        raise LoaderError(
            f"{rows.path} is compressed, and shuffle='global' takes single rows from anywhere; use shuffle='window'"
        )
    if not isinstance(rows.blobs, LocalBlobs):
        raise LoaderError(
            f"{rows.blobs.url} is not on a local disk, and shuffle='global' takes single rows from anywhere; use "
            "shuffle='window'"
        )
    return SingleRows(rows.blobs, rows.layouts, _READS)


def shard_edges(layouts: Sequence[ArrayLayout]) -> NDArray[np.int64]:
    """First sequence of each shard of all sections, [n_shards + 1]; the last one is the number of all."""
    found, end = [np.zeros(0, np.int64)], 0
    for layout in layouts:
        found.append(end + np.arange(0, layout.shape[0], layout.shard_rows))
        end += layout.shape[0]
    return np.concatenate([*found, [end]])

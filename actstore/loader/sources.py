"""Which way of reading rows fits an array, where it lies, and an order."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.loader.address_range import AddressRange
from actstore.loader.disk_cache import DiskCache
from actstore.loader.row_source import RowSource
from actstore.loader.single_rows import SingleRows
from actstore.loader.window_rows import N_REQUESTS, WindowRows
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
    blobs = rows.blobs
    is_compressed = any(layout.compression is not None for layout in rows.layouts)
    if isinstance(blobs, DiskCache) and not has_windows and not is_compressed:
        blobs = _all_fetched(blobs, rows)
    if isinstance(blobs, LocalBlobs) and AddressRange.fits(rows.layouts):
        return AddressRange(blobs, rows.layouts)
    if has_windows:
        return WindowRows(rows, edges)
    if is_compressed:
        raise LoaderError(
            f"{rows.path} is compressed, and shuffle='global' takes single rows from anywhere; use shuffle='window'"
        )
    if not isinstance(blobs, LocalBlobs):
        raise LoaderError(
            f"{blobs.url} is not on a local disk, and shuffle='global' takes single rows from anywhere; use "
            "shuffle='window', or a cache_dir with room for all of the hook"
        )
    return SingleRows(blobs, rows.layouts, _READS)


def _all_fetched(cache: DiskCache, rows: Rows) -> LocalBlobs:
    """Files of all shards of an array.

    Raises:
        LoaderError: the cache may not be that large.
    """
    if cache.limit is not None and rows.nbytes > cache.limit:
        raise LoaderError(
            f"shuffle='global' needs all of {rows.path} in cache_dir, {rows.nbytes} bytes, and cache_limit is "
            f"{cache.limit}; give it more, or use shuffle='window'"
        )
    keys = [layout.key(shard) for layout in rows.layouts for shard in range(layout.n_shards)]
    with ThreadPoolExecutor(N_REQUESTS, thread_name_prefix="fetch") as threads:
        for _ in threads.map(cache.fetch, keys):
            pass
    return cache.files


def shard_edges(layouts: Sequence[ArrayLayout]) -> NDArray[np.int64]:
    """First sequence of each shard of all sections, [n_shards + 1]; the last one is the number of all."""
    found, end = [np.zeros(0, np.int64)], 0
    for layout in layouts:
        found.append(end + np.arange(0, layout.shape[0], layout.shard_rows))
        end += layout.shape[0]
    return np.concatenate([*found, [end]])

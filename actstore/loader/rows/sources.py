"""Which way of reading rows fits an array, where it lies, and an order."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.loader.cache.disk_cache import DiskCache, NoRoomError
from actstore.loader.rows.address_range import AddressRange, n_free_maps
from actstore.loader.rows.cached_range import cached_range
from actstore.loader.rows.mapped_windows import MappedWindows
from actstore.loader.rows.row_source import RowSource
from actstore.loader.rows.shard_places import ShardPlaces
from actstore.loader.rows.single_rows import SingleRows
from actstore.loader.rows.window_rows import N_REQUESTS, WindowRows
from actstore.storage.local import LocalBlobs
from actstore.store.format.layout import ArrayLayout
from actstore.store.reading.rows import Rows

_READS: Final = 8
"""Of single rows at once, where files cannot be mapped."""
_LOG: Final = logging.getLogger(__name__)


def has_windows_in_memory(rows: Rows, *, is_cached: bool) -> bool:
    """Whether windows of an array are read into memory, as they are where shards are no files that can be mapped.

    Args:
        rows: the array.
        is_cached: whether its shards are fetched to a disk.
    """
    is_on_disk = is_cached or isinstance(rows.blobs, LocalBlobs | DiskCache)
    return not (is_on_disk and AddressRange.can_map(rows.layouts))


def source_of(
    rows: Rows,
    edges: NDArray[np.int64],
    *,
    has_windows: bool,
    n_requests: int | None = None,
    before_memory: Callable[[], None] | None = None,
) -> RowSource:
    """Files that can be mapped are, all at once or by windows; else windows are read, if the order has them.

    Args:
        rows: the array, all of it committed.
        edges: see `shard_edges`.
        has_windows: whether the order takes rows from a few shards at a time.
        n_requests: the most to remote storage at once; None for as many as make latency not matter.
        before_memory: see `MappedWindows`.

    Raises:
        LoaderError: rows from anywhere are asked for, and single rows cannot be read here.
        NotCommittedError: a row is not there.
        StorageError: a shard is missing or has another size than it must.
    """
    rows.check_committed()
    blobs, layouts = rows.blobs, rows.layouts
    if has_windows:
        if isinstance(blobs, LocalBlobs) and AddressRange.fits(layouts):
            return AddressRange(blobs, ShardPlaces(layouts), checksums=rows.checksums)
        if not has_windows_in_memory(rows, is_cached=False):
            return MappedWindows(rows, edges, n_requests, before_memory)
        return WindowRows(rows, edges, n_requests)
    if any(layout.compression is not None for layout in layouts):
        raise LoaderError(
            f"{rows.path} is compressed, and shuffle='global' takes single rows from anywhere; use shuffle='window'"
        )
    if not isinstance(blobs, LocalBlobs | DiskCache):
        raise LoaderError(
            f"{blobs.url} is not on a local disk, and shuffle='global' takes single rows from anywhere; use "
            "shuffle='window', or a cache_dir with room for all of the hook"
        )
    if AddressRange.fits(layouts):
        places = ShardPlaces(layouts)
        if isinstance(blobs, DiskCache):
            return _all_mapped(blobs, places, rows, n_requests or N_REQUESTS)
        return AddressRange(blobs, places, checksums=rows.checksums)
    if isinstance(blobs, DiskCache):
        with _needs_all(rows), blobs.room_for(rows.nbytes):
            pass  # it is only asked for
    if AddressRange.can_map(layouts):
        _LOG.warning(
            "%s has %d files, and this process may map %d more, so rows are read one by one, which is slow; run "
            "`sysctl -w vm.max_map_count=%d`, use shuffle='window', or extract with larger segments",
            rows.path,
            *_counts(layouts),
        )
    return SingleRows(rows, _READS)


def _counts(layouts: Sequence[ArrayLayout]) -> tuple[int, int, int]:
    """Files, maps that are left for them, and a limit that would be enough."""
    n_files = sum(layout.n_shards for layout in layouts)
    n_free = max(0, n_free_maps())
    return n_files, n_free, 1 << (2 * n_files + (1 << 16)).bit_length()


def _all_mapped(cache: DiskCache, places: ShardPlaces, rows: Rows, n_requests: int) -> AddressRange:
    """All shards of an array, fetched.

    Raises:
        LoaderError: the cache may not be that large.
    """
    with _needs_all(rows):
        return cached_range(cache, places, np.arange(places.n_shards), threading.Event(), n_requests)


@contextlib.contextmanager
def _needs_all(rows: Rows) -> Iterator[None]:
    try:
        yield
    except NoRoomError as error:
        raise LoaderError(
            f"shuffle='global' needs all of {rows.path} in cache_dir, {rows.nbytes} bytes, and {error}; give it more, "
            "or use shuffle='window'"
        ) from error


def shard_edges(layouts: Sequence[ArrayLayout]) -> NDArray[np.int64]:
    """First sequence of each shard of all sections, [n_shards + 1]; the last one is the number of all."""
    found, end = [np.zeros(0, np.int64)], 0
    for layout in layouts:
        found.append(end + np.arange(0, layout.shape[0], layout.shard_rows))
        end += layout.shape[0]
    return np.concatenate([*found, [end]])

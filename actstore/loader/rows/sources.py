"""Choosing how to read the rows of an array, by its storage and the order."""

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
from actstore.storage.blobs import are_files
from actstore.store.format.layout import ArrayLayout
from actstore.store.reading.rows import Rows

_READS: Final = 8
"""Single rows that are read at once where files cannot be mapped."""
_LOG: Final = logging.getLogger(__name__)


def has_windows_in_memory(rows: Rows, *, is_cached: bool) -> bool:
    """Whether windows of an array are read into memory: they are if its shards are not files that can be mapped.

    Args:
        rows: the array.
        is_cached: whether its shards are fetched to a disk.
    """
    is_on_disk = is_cached or rows.blobs.is_local or isinstance(rows.blobs, DiskCache)
    return not (is_on_disk and AddressRange.can_map(rows.layouts))


def source_of(
    rows: Rows,
    edges: NDArray[np.int64],
    *,
    has_windows: bool,
    n_requests: int | None = None,
    before_memory: Callable[[], None] | None = None,
) -> RowSource:
    """The source of the rows of an array. Files are mapped if they can be, all at once or window by window; otherwise
    windows are read, if the order has any.

    Args:
        rows: the array, all of it committed.
        edges: see `shard_edges`.
        has_windows: whether the order takes rows from a few shards at a time.
        n_requests: the most requests to remote storage at once; None takes enough to hide latency.
        before_memory: see `MappedWindows`.

    Raises:
        LoaderError: the order takes rows from anywhere, and single rows cannot be read from this storage.
        NotCommittedError: a row is not committed.
        StorageError: a shard is missing or has the wrong size.
    """
    rows.check_committed()
    blobs, layouts = rows.blobs, rows.layouts
    if has_windows:
        if are_files(blobs) and AddressRange.fits(layouts):
            return AddressRange(blobs, ShardPlaces(layouts), checksums=rows.checksums)
        if not has_windows_in_memory(rows, is_cached=False):
            return MappedWindows(rows, edges, n_requests, before_memory)
        return WindowRows(rows, edges, n_requests)
    if any(layout.compression is not None for layout in layouts):
        raise LoaderError(
            f"{rows.path} is compressed, and shuffle='global' takes single rows from anywhere; use shuffle='window'"
        )
    if not (are_files(blobs) or isinstance(blobs, DiskCache)):
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
            pass  # only checks that there is room
    if AddressRange.can_map(layouts):
        _LOG.warning(
            "%s has %d files, and this process may map %d more, so rows are read one by one, which is slow; run "
            "`sysctl -w vm.max_map_count=%d`, use shuffle='window', or extract with larger segments",
            rows.path,
            *_counts(layouts),
        )
    return SingleRows(rows, _READS)


def _counts(layouts: Sequence[ArrayLayout]) -> tuple[int, int, int]:
    """(number of files, maps that are left for them, a limit of maps that would be enough)."""
    n_files = sum(layout.n_shards for layout in layouts)
    n_free = max(0, n_free_maps())
    return n_files, n_free, 1 << (2 * n_files + (1 << 16)).bit_length()


def _all_mapped(cache: DiskCache, places: ShardPlaces, rows: Rows, n_requests: int) -> AddressRange:
    """Fetch and map all shards of an array.

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
    """The first sequence of each shard of all sections, [n_shards + 1]; the last entry is the number of all."""
    edges, end = [np.zeros(0, np.int64)], 0
    for layout in layouts:
        edges.append(end + np.arange(0, layout.shape[0], layout.shard_rows))
        end += layout.shape[0]
    return np.concatenate([*edges, [end]])

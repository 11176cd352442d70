"""How much memory the batches of a store take, computed before any of it is allocated."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from actstore.loader.dropping.drop import Drop
from actstore.loader.dropping.norm_limit import BLOCK_NBYTES
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions
from actstore.loader.ordering.order import AHEAD_ROWS, largest_window
from actstore.loader.rows.sources import has_windows_in_memory, shard_edges
from actstore.loader.rows.window_rows import COPIED_NBYTES, N_REQUESTS
from actstore.store.reading.rows import Rows
from actstore.store.reading.sections import PIECE_NBYTES

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

_NUMBERS_NBYTES: Final = 64
"""Bytes per row of a batch that is being made: its number in the order, in the store and in its window, and scratch for
computing them.
"""
_ORIGIN_NBYTES: Final = 8 + 8 + 8 + 4
"""Bytes per row with provenance: sequence, position, token, and the position or token as stored."""
_COPIED_NBYTES: Final = 2 * COPIED_NBYTES
"""Bytes for rows that are being converted and for rows that are being copied from a window."""

_MARKED_NBYTES: Final = 0.4
"""Bytes per row of the store: a bit while rows are searched, a bit in the result, and the counts."""


@dataclass(frozen=True)
class Footprint:
    """The most bytes that a `BatchMaker` takes. Mapped files are not counted, since the system can reclaim them, nor
    are valid rows, which makers can share: see `ValidRows.nbytes`. Where torch has several threads (it has one in a
    server), each of up to 8 keeps 1 MiB for rows of mapped files that are converted, which is not counted either.
    """

    batch: int
    """Bytes of each batch."""
    windows: int
    """Bytes of windows that are kept from batch to batch."""
    scratch: int
    """Bytes that are needed while a batch is made."""
    spilled: dict[str, int]
    """Bytes of windows that go to a disk, by array; they take memory if the disk has no room."""


def footprint(
    store: "CommittedStore",
    options: LoaderOptions,
    rows: ValidRows | None = None,
    n_requests: int = N_REQUESTS,
) -> Footprint:
    """The footprint of a `BatchMaker` with these options. Nothing is read.

    Args:
        store: the store that the rows are in.
        options: the options of the maker.
        rows: the rows that are not dropped; None counts every row.
        n_requests: the most requests to remote storage at once, for each hook.
    """
    n_rows = min(options.batch_size, math.prod(store.shape))
    batch = batch_nbytes(store, options)
    scratch = n_rows * _NUMBERS_NBYTES + _COPIED_NBYTES
    windows, spilled = 0, {}
    if options.shuffle != "global":
        window_rows, n_shards, n_windows = _window(store, options, rows)
        for name, array in _arrays(store, options):
            held = min(2, n_windows) * window_rows * _width(array) * array.storage.itemsize
            is_cached = options.cache_dir is not None and not array.blobs.is_local
            if has_windows_in_memory(array, is_cached=is_cached):
                windows += held
            elif is_cached:
                spilled[name] = held
    else:
        n_shards = len(shard_edges(store[options.hooks[0]].rows.layouts)) - 1
    for _, array in _arrays(store, options):
        if not array.blobs.is_local:
            # A piece of each shard that is being fetched.
            shard_nbytes = max(layout.max_shard_nbytes(0) for layout in array.layouts)
            scratch += min(n_requests, n_shards) * min(PIECE_NBYTES, shard_nbytes)
    return Footprint(batch, windows, scratch, spilled)


def batch_nbytes(store: "CommittedStore", options: LoaderOptions) -> int:
    """Bytes of one batch, all ranks together."""
    of_row = sum(
        _width(store[hook].rows) * (options.dtype or store[hook].dtype).itemsize for hook in options.hooks
    )
    return min(options.batch_size, math.prod(store.shape)) * (
        of_row + (_ORIGIN_NBYTES if options.provenance else 0)
    )


def finding_nbytes(store: "CommittedStore", drop: Drop, hooks: Sequence[str]) -> int:
    """Bytes that it takes to find the rows that are not dropped, block by block, and to keep the result."""
    n_rows = math.prod(store.shape)
    itemsize = store[hooks[0]].rows.storage.itemsize
    # Token ids and masks; roles; values, and values in float64 for a norm.
    n_blocks = (
        2
        + bool(drop.roles)
        + 2 * drop.is_nonfinite_dropped
        + (1 + 8 // itemsize) * (drop.max_norm is not None)
    )
    least_nbytes = 8 * max(array.layouts[0].row_nbytes for array in (store[hook].rows for hook in hooks))
    return int(_MARKED_NBYTES * n_rows) + n_blocks * max(BLOCK_NBYTES, least_nbytes)


def _arrays(store: "CommittedStore", options: LoaderOptions) -> Iterator[tuple[str, Rows]]:
    yield from ((hook, store[hook].rows) for hook in options.hooks)
    if options.provenance:
        yield "tokens", store.tokens
        if store.positions is not None:
            yield "positions", store.positions


def _width(array: Rows) -> int:
    return math.prod(array.shape[2:])


def _window(store: "CommittedStore", options: LoaderOptions, rows: ValidRows | None) -> tuple[int, int, int]:
    """(stored rows of the largest window, its shards, windows of an epoch)."""
    edges = shard_edges(store[options.hooks[0]].rows.layouts) * store.shape[1]
    stored = np.diff(edges)
    if rows is not None:
        stored = stored[np.diff(rows.rank(edges)) > 0]
    n_windows, n_rows = largest_window(
        stored, options.window_rows if options.shuffle == "window" else AHEAD_ROWS
    )
    return n_rows, min(len(stored), -(-n_rows // max(1, int(stored.min())))), n_windows

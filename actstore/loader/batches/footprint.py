"""How much memory batches of a store take, told before any of it is taken."""

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
from actstore.storage.local import LocalBlobs
from actstore.store.reading.rows import Rows
from actstore.store.reading.sections import PIECE_NBYTES

if TYPE_CHECKING:
    from actstore.store.store import Store

_NUMBERS_NBYTES: Final = 64
"""For each row of a batch that is being made: its number in the order, in the store, in its window, and what computes
them.
"""
_ORIGIN_NBYTES: Final = 8 + 8 + 8 + 4
"""Of each row with provenance: sequence, position, token, and the token as it is stored."""
_COPIED_NBYTES: Final = 2 * COPIED_NBYTES
"""For rows that are converted, or copied from a window, together."""

_MARKED_NBYTES: Final = 0.4
"""For each row: a bit as it is found, one in the order of all, and what counts them."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a `BatchMaker` takes at most. Files that are mapped are not counted: the system has them back when it
    wants to. So are valid rows, which makers can share: `ValidRows.nbytes`. Where torch has several threads, as it has
    not in a server, rows of mapped files are converted in blocks of 16 MiB, which is not counted either.
    """

    batch: int
    """Of each batch."""
    windows: int
    """That are held from batch to batch."""
    scratch: int
    """While a batch is made."""
    spilled: dict[str, int]
    """By array whose windows are on a disk: bytes of them if that has no room."""


def footprint(
    store: "Store", options: LoaderOptions, rows: ValidRows | None = None, n_requests: int = N_REQUESTS
) -> Footprint:
    """Of a maker with these options. Nothing is read.

    Args:
        store: whose rows they are.
        options: of the maker.
        rows: those that are not dropped; None takes them all as valid.
        n_requests: the most to remote storage at once, of each hook.
    """
    n_rows = min(options.batch_size, math.prod(store.shape))
    batch = batch_nbytes(store, options)
    scratch = n_rows * _NUMBERS_NBYTES + _COPIED_NBYTES
    windows, spilled = 0, {}
    if options.shuffle != "global":
        window_rows, n_shards, n_windows = _window(store, options, rows)
        for name, array in _arrays(store, options):
            held = min(2, n_windows) * window_rows * _width(array) * array.storage.itemsize
            is_cached = options.cache_dir is not None and not isinstance(array.blobs, LocalBlobs)
            if has_windows_in_memory(array, is_cached=is_cached):
                windows += held
            elif is_cached:
                spilled[name] = held
    else:
        n_shards = len(shard_edges(store[options.hooks[0]].rows.layouts)) - 1
    for _, array in _arrays(store, options):
        if not isinstance(array.blobs, LocalBlobs):
            # A piece of each shard that is being fetched.
            shard_nbytes = max(layout.max_shard_nbytes(0) for layout in array.layouts)
            scratch += min(n_requests, n_shards) * min(PIECE_NBYTES, shard_nbytes)
    return Footprint(batch, windows, scratch, spilled)


def batch_nbytes(store: "Store", options: LoaderOptions) -> int:
    """Of a batch alone, of all ranks."""
    of_row = sum(
        _width(store[hook].rows) * (options.dtype or store[hook].dtype).itemsize for hook in options.hooks
    )
    return min(options.batch_size, math.prod(store.shape)) * (
        of_row + (_ORIGIN_NBYTES if options.provenance else 0)
    )


def finding_nbytes(store: "Store", drop: Drop, hooks: Sequence[str]) -> int:
    """That it takes to find which rows are not dropped, piece by piece, and to know them then."""
    n_rows = math.prod(store.shape)
    itemsize = store[hooks[0]].rows.storage.itemsize
    # Token ids and masks; values, in float64 for a norm.
    n_blocks = 2 + 2 * drop.is_nonfinite_dropped + (1 + 8 // itemsize) * (drop.max_norm is not None)
    least_nbytes = 8 * max(array.layouts[0].row_nbytes for array in (store[hook].rows for hook in hooks))
    return int(_MARKED_NBYTES * n_rows) + n_blocks * max(BLOCK_NBYTES, least_nbytes)


def _arrays(store: "Store", options: LoaderOptions) -> Iterator[tuple[str, Rows]]:
    yield from ((hook, store[hook].rows) for hook in options.hooks)
    if options.provenance:
        yield "tokens", store.tokens


def _width(array: Rows) -> int:
    return math.prod(array.shape[2:])


def _window(store: "Store", options: LoaderOptions, rows: ValidRows | None) -> tuple[int, int, int]:
    """Stored rows of the largest window, its shards, and how many windows an epoch has."""
    edges = shard_edges(store[options.hooks[0]].rows.layouts) * store.shape[1]
    stored = np.diff(edges)
    if rows is not None:
        stored = stored[np.diff(rows.rank(edges)) > 0]
    n_windows, n_rows = largest_window(
        stored, options.window_rows if options.shuffle == "window" else AHEAD_ROWS
    )
    return n_rows, min(len(stored), -(-n_rows // max(1, int(stored.min())))), n_windows

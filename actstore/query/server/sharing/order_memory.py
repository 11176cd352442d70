"""Computes the memory that an order of batches takes, and refuses what is too much."""

from dataclasses import replace
from typing import Final

from actstore.loader.batches.footprint import Footprint, footprint
from actstore.loader.batches.lent_rows import can_lend
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions
from actstore.loader.ordering.order import WINDOW_ROWS
from actstore.query.server.memory.budget import MemoryBudget
from actstore.store.committed_store import CommittedStore
from actstore.store.reading.sections import PIECE_NBYTES

ORDER_NBYTES: Final = 4 << 20
"""Bytes that threads, tables and maps of an order count as, so that their number is limited."""
_FETCHING: Final = 8
"""The shards of remote storage that are being fetched for an order take one part in so many of the budget."""

_KEPT: Final = 16
"""Batches of an order that are kept at most: those that were asked for last."""
_PARTS: Final = 16
"""The kept batches of an order take one part in so many of the budget, or two batches."""


def n_kept_of(limit: int, needed: Footprint) -> int:
    """How many batches of an order are kept, with a budget of ``limit`` bytes."""
    return max(2, min(_KEPT, limit // _PARTS // max(1, needed.batch)))


def n_requests_of(budget: MemoryBudget, options: LoaderOptions) -> int:
    """Requests to remote storage at once, for each hook of an order."""
    return max(1, budget.limit // _FETCHING // PIECE_NBYTES // (len(options.hooks) + options.provenance))


def checked_footprint(
    budget: MemoryBudget, store: CommittedStore, options: LoaderOptions, rows: ValidRows | None = None
) -> Footprint:
    """The memory of an order, checked against the share of a client. Batches count as 0 if they are sent from where
    their rows lie.

    Args:
        budget: memory budget of the process.
        store: store with the rows.
        options: options of the loader, of all ranks.
        rows: rows that are not dropped; None counts all rows.

    Raises:
        Problem: the order takes more than a client may have.
    """
    needed = footprint(store, options, rows, n_requests_of(budget, options))
    if can_lend(store, options):
        needed = replace(needed, batch=0)
    nbytes = _total(needed)
    if nbytes > budget.share:
        what = "a batch of this order takes"
        if needed.windows:
            what = "a batch of this order, and the windows that it is from, take"
        budget.check(nbytes, what, _remedy(budget, store, options, nbytes))
    return needed


def _total(needed: Footprint) -> int:
    return needed.batch + needed.windows + needed.scratch + ORDER_NBYTES


def _remedy(budget: MemoryBudget, store: CommittedStore, options: LoaderOptions, nbytes: int) -> str:
    """What a client can ask for instead of an order that takes too many bytes."""
    n_requests = n_requests_of(budget, options)

    def fits(batch_size: int, window_rows: int = options.window_rows) -> bool:
        changed = replace(options, batch_size=batch_size, window_rows=window_rows)
        return _total(footprint(store, changed, None, n_requests)) <= budget.share

    enough = -(-nbytes * budget.limit // budget.share)
    server = f"start the server with --memory {enough} or more"
    if options.shuffle == "window" and not fits(1):
        window_rows = min(options.window_rows, store.shape[0] * store.shape[1])
        while window_rows > 1 and not fits(1, window_rows):
            window_rows //= 2
        if not fits(1, window_rows):
            return f"{server}: it has too little for any batch of this hook"
        return f"ask for window_rows={window_rows} or less, which is {WINDOW_ROWS} if it is not said, or {server}"
    batch_size = options.batch_size
    while batch_size > 1 and not fits(batch_size):
        batch_size //= 2
    if not fits(batch_size):
        return f"{server}: it has too little for any batch of this hook"
    return f"ask for batch_size={batch_size} or less, or {server}"

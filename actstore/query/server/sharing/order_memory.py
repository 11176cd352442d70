"""What an order of batches takes of the memory of a process, and what is too much."""

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
"""What threads, tables and maps of an order are counted as: there cannot be any number of them."""
_FETCHING: Final = 8
"""Part of the budget that the shards of remote storage take that are being fetched for an order."""

_KEPT: Final = 16
"""Batches of an order at most, the last that were asked for."""
_PARTS: Final = 16
"""Into which the budget is divided for batches that are only kept: one order has one of them, or two batches."""


def n_kept_of(limit: int, needed: Footprint) -> int:
    """How many batches of an order are kept, of a budget of so many bytes."""
    return max(2, min(_KEPT, limit // _PARTS // max(1, needed.batch)))


def n_requests_of(budget: MemoryBudget, options: LoaderOptions) -> int:
    """To remote storage at once, of each hook of an order."""
    return max(1, budget.limit // _FETCHING // PIECE_NBYTES // (len(options.hooks) + options.provenance))


def checked(
    budget: MemoryBudget, store: CommittedStore, options: LoaderOptions, rows: ValidRows | None = None
) -> Footprint:
    """What an order takes: nothing for batches, if these are sent from where their rows lie.

    Args:
        budget: of the process.
        store: whose rows they are.
        options: of the loader, of all ranks.
        rows: those that are not dropped; None takes them all as valid.

    Raises:
        Problem: no client may have so much.
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
    """What to ask for in the place of an order that takes too many bytes."""
    n_requests = n_requests_of(budget, options)

    def fits(batch_size: int, window_rows: int = options.window_rows) -> bool:
        changed = replace(options, batch_size=batch_size, window_rows=window_rows)
        return _total(footprint(store, changed, None, n_requests)) <= budget.share

    enough = -(-nbytes * budget.limit // budget.share)
    server = f"start the server with --memory {enough} or more"
    if options.shuffle == "window" and not fits(1):
        found = min(options.window_rows, store.shape[0] * store.shape[1])
        while found > 1 and not fits(1, found):
            found //= 2
        if not fits(1, found):
            return f"{server}: it has too little for any batch of this hook"
        return f"ask for window_rows={found} or less, which is {WINDOW_ROWS} if it is not said, or {server}"
    found = options.batch_size
    while found > 1 and not fits(found):
        found //= 2
    if not fits(found):
        return f"{server}: it has too little for any batch of this hook"
    return f"ask for batch_size={found} or less, or {server}"

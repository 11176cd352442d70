"""Several scans one after the other, where the sums of all hooks at once would take too much memory."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar, Unpack

from actstore.analysis.geometry.sums.moments import ProductSums
from actstore.analysis.scanning.scan import Progress, Scanned, ScanOptions, scan

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

MAX_NBYTES: Final = 2 << 30
"""Bytes of the sums of one pass, where a caller says nothing else."""
_Item = TypeVar("_Item")


def packed_within(items: Iterable[tuple[_Item, int]], max_nbytes: int) -> list[list[_Item]]:
    """Items in groups of up to so many bytes, in order; one that is larger by itself is a group.

    Args:
        items: items and their bytes.
        max_nbytes: the most bytes of a group of several.
    """
    groups: list[list[_Item]] = []
    filled = 0
    for item, nbytes in items:
        if not groups or filled + nbytes > max_nbytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += nbytes
    return groups


def scan_each(
    store: "CommittedStore", reductions: Sequence[ProductSums], **options: Unpack[ScanOptions]
) -> list[Scanned]:
    """Scan a store once for each reduction, which is its only result, ``sums``. Progress is that of all scans together.

    Raises:
        ActstoreError: see `scan`.
    """
    tell = options.get("on_progress")
    started = time.perf_counter()
    scanned: list[Scanned] = []

    def on_progress(progress: Progress) -> None:
        assert tell is not None
        n_in_all = progress.n_sequences_in_all * len(reductions)
        n_done = progress.n_sequences_in_all * len(scanned) + progress.n_sequences
        n_rows = progress.n_rows + sum(one.n_rows for one in scanned)
        seconds = time.perf_counter() - started
        left = seconds / n_done * (n_in_all - n_done) if n_done else None
        tell(Progress(n_done, n_in_all, n_rows, seconds, left))

    own: ScanOptions = {**options}
    if tell is not None:
        own["on_progress"] = on_progress
    for reduction in reductions:
        scanned.append(scan(store, {"sums": reduction}, **own))
    return scanned

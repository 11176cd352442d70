"""Scanning a store: every unit once, on this machine or on Ray, and where an earlier scan was stopped."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.analysis.scanning.reduction import Reduction, State, hooks_of
from actstore.analysis.scanning.saved_state import damaged_state, folder_of, from_bytes, key_of, to_bytes
from actstore.analysis.scanning.unit import ScanSpec, UnitDone, Units
from actstore.errors import JobError
from actstore.extraction.computing.executor import Resources
from actstore.extraction.computing.executor import executor as find_executor
from actstore.storage.blobs import Blobs
from actstore.storage.opening import open_blobs

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore


@dataclass(frozen=True)
class Progress:
    """How far a scan has come."""

    n_sequences: int
    """Sequences that are scanned, those of an earlier scan included."""
    n_sequences_in_all: int
    n_rows: int
    """Rows that were taken so far in this scan."""
    seconds: float
    """Time since this scan began."""
    seconds_left: float | None
    """Estimate of the time that is left; None before anything is done."""


OnProgress = Callable[[Progress], None]


class ScanOptions(TypedDict, total=False):
    """The keyword arguments of `scan`, for analyses that pass them on."""

    drop: Sequence[str | int]
    seqpos: slice | Sequence[int] | None
    sequences: Any
    resume: str | None
    executor: str
    num_workers: int | None
    ray_address: str | None
    on_progress: OnProgress | None


@dataclass(frozen=True)
class Scanned:
    """The results of a scan."""

    results: Mapping[str, Any]
    """The result of each reduction, by its name."""
    n_rows: int
    """Rows that were taken."""
    n_not_finite: Mapping[str, int]
    """Rows of each hook with NaN or infinity, which were left out."""
    n_units: int
    n_units_before: int
    """Units that an earlier scan had finished."""
    seconds: float


@dataclass
class _Merging:
    """States of all units, merged in order as they come."""

    reductions: Sequence[Reduction]
    states: list[State] = field(default_factory=list)
    waiting: dict[int, list[State]] = field(default_factory=dict)
    n_merged: int = 0
    n_rows: int = 0
    n_not_finite: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.states = [reduction.start() for reduction in self.reductions]

    def add(self, unit: UnitDone) -> None:
        self.n_rows += unit.n_rows
        self.n_not_finite.update(unit.n_not_finite)
        restored = [one.restore(arrays) for one, arrays in zip(self.reductions, unit.states, strict=True)]
        self.waiting[unit.index] = restored
        while (states := self.waiting.pop(self.n_merged, None)) is not None:
            for state, other in zip(self.states, states, strict=True):
                state.merge(other)
            self.n_merged += 1


def scan(
    store: "CommittedStore",
    reductions: Mapping[str, Reduction],
    *,
    drop: Sequence[str | int] = (),
    seqpos: slice | Sequence[int] | None = None,
    sequences: Any = None,
    resume: str | None = None,
    executor: str = "inline",
    num_workers: int | None = None,
    ray_address: str | None = None,
    on_progress: OnProgress | None = None,
) -> Scanned:
    """Read the rows of a store once, and give each reduction all of them.

    The result has the same bits with any executor and number of workers, and after any interruption. Padding and rows
    that are not finite are left out; the latter are counted.

    Args:
        store: the store; rows that are committed later do not count.
        reductions: what to make of the rows, by a name of your choice.
        drop: ``bos``, ``eos``, ``sep``, or token ids whose rows are left out; of chats also ``template``, ``system``,
            ``user``, ``assistant`` and ``tool``.
        seqpos: positions to take, a slice or a list; None for all.
        sequences: sequences to take: a slice, a list of numbers, or bool [n_sequences]; None for all.
        resume: folder or URL where finished units are kept. The same scan goes on from them; other scans do not
            mind them. Nothing is kept if it is None.
        executor, num_workers, ray_address: as for `actstore.extract`.
        on_progress: called after each unit.

    Raises:
        HookError: a hook is not stored.
        JobError, LoaderError: the choice of rows, or a resource, is not valid; or the scan cannot be resumed.
        NotCommittedError: rows are not committed.
        StorageError: something cannot be read or written.
        StoreReplacedError: another store came in the place of this one while it was read.
    """
    if not reductions:
        raise JobError("a scan needs one reduction at least, and none was given")
    if num_workers is not None and num_workers < 1:
        raise JobError(f"num_workers is {num_workers}; it must be 1 or more")
    started = time.perf_counter()
    store.check_version()
    rows = ChosenRows.of(store, drop, seqpos, sequences)
    chosen = tuple(reductions.values())
    for hook in hooks_of(chosen):
        store[hook].rows.check_committed()
    units = Units.of(store.shape)
    merging = _Merging(chosen)
    blobs = None if resume is None else open_blobs(resume)
    folder, finished, n_sequences = "", set[int](), 0
    if blobs is not None:
        _check_identity(store)
        folder = folder_of(str(store.identity), [one.identity() for one in chosen], rows.identity())
        for unit_before in _finished(blobs, folder, chosen, units):
            merging.add(unit_before)
            finished.add(unit_before.index)
            n_sequences += unit_before.n_sequences
    n_before = n_sequences

    def on_unit(unit: UnitDone) -> None:
        nonlocal n_sequences
        if blobs is not None:
            blobs.create(key_of(folder, unit.index), [_with_counts(unit)])
        merging.add(unit)
        n_sequences += unit.n_sequences
        if on_progress is not None:
            seconds = time.perf_counter() - started
            rate = (n_sequences - n_before) / seconds
            left = (units.n_sequences - n_sequences) / rate if rate else None
            on_progress(Progress(n_sequences, units.n_sequences, merging.n_rows, seconds, left))

    pending = [index for index in range(len(units)) if index not in finished]
    if pending:
        spec = ScanSpec(store, chosen, rows)
        find_executor(executor)(spec, pending, Resources(num_workers, ray_address), on_unit)
    store.check_version()
    if not merging.n_rows:
        raise JobError(
            f"no row of {store.url} is left to scan; drop fewer of them, or choose other positions (seqpos) or "
            "sequences"
        )
    return Scanned(
        results={
            name: reduction.finish(state)
            for (name, reduction), state in zip(reductions.items(), merging.states, strict=True)
        },
        n_rows=merging.n_rows,
        n_not_finite=dict(merging.n_not_finite),
        n_units=len(units),
        n_units_before=len(finished),
        seconds=time.perf_counter() - started,
    )


def _check_identity(store: "CommittedStore") -> None:
    """Check that the store can be told from all others, so that kept states are not taken for those of another one.

    Raises:
        JobError: it cannot.
    """
    if any(run.endswith("~") for run in store.identity):
        raise JobError(
            f"{store.url} is not finished, so that over HTTP nothing tells it from another store with the same plan; "
            "finish it, open its storage itself, or leave resume out"
        )


def _with_counts(unit: UnitDone) -> bytes:
    """The states of a unit and, behind them, its counts."""
    counts = {
        "sequences_and_rows": np.array([unit.n_sequences, unit.n_rows], np.int64),
        "not_finite": np.array(list(unit.n_not_finite.values()), np.int64),
    }
    return to_bytes([*unit.states, counts])


def _finished(blobs: Blobs, folder: str, reductions: Sequence[Reduction], units: Units) -> Iterator[UnitDone]:
    """The units that an earlier scan has kept, one after the other, since the states of all can be large.

    Raises:
        StorageError: one is damaged.
    """
    hooks = hooks_of(reductions)
    names = set(blobs.names(folder))
    for index in range(len(units)):
        key = key_of(folder, index)
        if key.rpartition("/")[2] not in names:
            continue
        where = f"{blobs.url}/{key}"
        *states, counts = from_bytes(blobs.read(key), len(reductions) + 1, where)
        try:
            n_sequences, n_rows = counts["sequences_and_rows"].tolist()
            n_not_finite = dict(zip(hooks, counts["not_finite"].tolist(), strict=True))
            for reduction, arrays in zip(reductions, states, strict=True):
                reduction.restore(arrays)
        except (KeyError, ValueError) as error:
            raise damaged_state(where) from error
        yield UnitDone(index, n_sequences, n_rows, n_not_finite, 0.0, tuple(states))

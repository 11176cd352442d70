"""The worker, which reduces one unit of a store at a time. Every executor uses it, as `actstore.extraction` says."""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.scanning.block import Block, rows_of
from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.analysis.scanning.reduction import Arrays, Reduction, hooks_of
from actstore.extraction.computing.worker import InterruptedRunError
from actstore.store.committed_store import CommittedStore
from actstore.store.statistics.moments import has_statistics
from actstore.store.statistics.not_finite import is_masked_by_design

if TYPE_CHECKING:
    import torch

_BLOCK_ROWS: Final = 8192
"""Rows of a block, if sequences are not longer: enough for matrix products to be fast."""
_UNIT_ROWS: Final = 1 << 18
"""The most rows of a unit, if sequences are not longer. What a kill can lose, and what a worker computes at once."""
_UNITS: Final = 16
"""Units that a store should have at least, so that several workers can share it."""


@dataclass(frozen=True)
class Units:
    """The units and blocks of a store, which follow from its shape alone."""

    n_sequences: int
    block: int
    """Sequences of a block."""
    unit: int
    """Sequences of a unit, a multiple of `block`."""

    @classmethod
    def of(cls, shape: tuple[int, int]) -> "Units":
        """The units of a store of this shape."""
        n_sequences, width = shape
        block = max(1, _BLOCK_ROWS // width)
        wanted = min(max(1, _UNIT_ROWS // width), math.ceil(n_sequences / _UNITS))
        return cls(n_sequences, block, math.ceil(wanted / block) * block)

    def __len__(self) -> int:
        return math.ceil(self.n_sequences / self.unit)

    def blocks(self, index: int) -> list[range]:
        """Sequences of each block of a unit."""
        stop = min((index + 1) * self.unit, self.n_sequences)
        return [
            range(first, min(first + self.block, stop))
            for first in range(index * self.unit, stop, self.block)
        ]


@dataclass(frozen=True)
class UnitDone:
    """A unit, reduced."""

    index: int
    n_sequences: int
    n_rows: int
    n_not_finite: Mapping[str, int]
    seconds: float
    states: tuple[Arrays, ...]
    """State of each reduction."""


@dataclass(frozen=True)
class ScanSpec:
    """What a worker needs to start on any machine."""

    unit: ClassVar[str] = "unit"
    """See `actstore.extraction.computing.executor.Spec`."""

    store: CommittedStore
    reductions: tuple[Reduction, ...]
    rows: ChosenRows
    device: str | None = None
    n_threads: int | None = 1
    """Threads of one unit. Sums depend on how they are divided among threads, so it is one; several units are reduced
    at the same time.
    """

    def start(self) -> "ScanWorker":
        return ScanWorker(self)


class _Lent:
    """Memory of a read-only array, for torch, which knows no read-only tensors. The array lives as long as this."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


class ScanWorker:
    """Reduces units. `run` may be called from several threads at once, each of which reduces its own."""

    def __init__(self, spec: ScanSpec) -> None:
        import torch

        self._spec = spec
        self._units = Units.of(spec.store.shape)
        self._hooks = hooks_of(spec.reductions)
        self._suspects = {hook: _not_finite_sequences(spec.store, hook) for hook in self._hooks}
        self._stopped = threading.Event()
        n_cores = os.cpu_count() or 1
        # Reading from a network takes no core.
        is_local = all(spec.store[hook].rows.blobs.is_local for hook in self._hooks)
        self._turns = threading.BoundedSemaphore(n_cores if is_local else 2 * n_cores)
        self._n_threads_before = torch.get_num_threads()

    def run(self, index: int) -> UnitDone:
        """Reduce one unit.

        Raises:
            ActstoreError: rows are not committed or cannot be read.
            InterruptedRunError: `stop` was called.
        """
        import torch

        with self._turns:
            # For this thread: torch keeps the number of threads by thread.
            torch.set_num_threads(self._spec.n_threads or 1)
            return self._reduce(index)

    def _reduce(self, index: int) -> UnitDone:
        started = time.perf_counter()
        states = [reduction.start() for reduction in self._spec.reductions]
        n_rows = n_sequences = 0
        n_not_finite = dict.fromkeys(self._hooks, 0)
        for sequences in self._units.blocks(index):
            if self._stopped.is_set():
                raise InterruptedRunError("the scan was asked to stop")
            block = self._block(sequences)
            n_rows, n_sequences = n_rows + len(block), n_sequences + len(sequences)
            for hook, n in block.n_not_finite.items():
                n_not_finite[hook] += n
            if len(block):
                for state in states:
                    state.update(block)
        arrays = tuple(state.arrays() for state in states)
        return UnitDone(index, n_sequences, n_rows, n_not_finite, time.perf_counter() - started, arrays)

    def _block(self, sequences: range) -> Block:
        store, span = self._spec.store, slice(sequences.start, sequences.stop)
        entries = store.entries
        tokens, positions = entries.of_tokens(store.tokens, span), entries.positions(span)
        chosen = self._spec.rows
        roles = entries.of_tokens(store.roles, span) if chosen.roles else None
        taken = chosen.of_block(span, tokens, positions, entries.in_use(span), roles)
        counts: dict[str, int] = {}
        read: dict[str, torch.Tensor] = {}
        for hook, suspects in self._suspects.items():
            if suspects is not None and not suspects[span].any():
                continue
            read[hook] = self._read(sequences, hook)
            is_finite = _is_finite(hook, read[hook])
            counts[hook] = int((taken & ~is_finite).sum())
            taken &= is_finite
        kept = None if taken.all() else np.flatnonzero(taken)
        width = tokens.shape[1]
        places = np.arange(taken.size) if kept is None else kept

        def values(hook: str) -> "torch.Tensor":
            if hook not in read:
                read[hook] = self._read(sequences, hook)
            return rows_of(read[hook], kept)

        return Block(
            width=width,
            addresses=places + sequences.start * width,
            tokens=tokens.reshape(-1)[places],
            documents=entries.of_tokens(store.documents, span).reshape(-1)[places],
            positions=positions.reshape(-1)[places],
            n_not_finite=counts,
            read=partial(_cached, {}, values),
        )

    def _read(self, sequences: range, hook: str) -> "torch.Tensor":
        """Values of whole sequences, [n_sequences, width, *shape]; those in one local file are not copied."""
        import torch

        activations = self._spec.store[hook]
        stored = activations.rows.as_stored(sequences)
        shape = (len(sequences), *activations.shape[1:])
        if (
            stored is None
            or np.frombuffer(stored, np.uint8).nbytes < math.prod(shape) * activations.dtype.itemsize
        ):
            return activations[sequences.start : sequences.stop]
        data = torch.from_numpy(np.asarray(_Lent(np.frombuffer(stored, np.uint8))))
        return data.view(activations.dtype).view(shape)

    def stop(self) -> None:
        """Give up units that are under way at their next block."""
        self._stopped.set()

    def close(self) -> None:
        """Give torch its threads back."""
        import torch

        torch.set_num_threads(self._n_threads_before)


def _cached(
    known: "dict[str, torch.Tensor]", read: "Callable[[str], torch.Tensor]", hook: str
) -> "torch.Tensor":
    if hook not in known:
        known[hook] = read(hook)
    return known[hook]


def _not_finite_sequences(store: CommittedStore, hook: str) -> NDArray[np.bool_] | None:
    """Sequences that may have rows with NaN or infinity, [n_sequences]. None if any may: nothing was counted."""
    if not has_statistics(store.array_of(hook)):
        return None
    suspects = np.zeros(store.shape[0], bool)
    for sequences, _ in store.not_finite(hook):
        suspects[sequences.start : sequences.stop] = True
    return suspects


def _is_finite(hook: str, values: "torch.Tensor") -> NDArray[np.bool_]:
    """Whether all elements of a row are finite, [n_sequences, width]. Scores of what is masked may be -Inf."""
    flat = values.flatten(2)
    is_finite = flat.isfinite()
    if is_masked_by_design(hook):
        is_finite |= flat == -math.inf
    all_finite: NDArray[np.bool_] = is_finite.all(-1).numpy()
    return all_finite

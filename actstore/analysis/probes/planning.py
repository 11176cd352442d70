"""Planning: which hooks are fitted together, and whether their rows are held in memory."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from actstore.analysis.probes.probe import Kind
from actstore.analysis.probes.rows.passes import Targets
from actstore.analysis.probes.rows.splits import HELD_OUT
from actstore.errors import JobError
from actstore.memory import free_nbytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from actstore.store.committed_store import CommittedStore

_SAMPLE_ROWS: Final = 4096
_SAMPLE_ROWS_PER_ELEMENT: Final = 4
_READING: Final = 1.6
"""Memory for rows while they are read, relative to that of all: units are on their way, and freed memory is not given
back at once.
"""


@dataclass(frozen=True)
class Group:
    """Hooks that are fitted together."""

    hooks: tuple[str, ...]
    is_held: bool
    """Whether the rows are read once and held in memory, rather than read again in every pass."""


def sample_rows(n_train: int, size: int) -> int:
    """Rows from which the Hessian of a hook is computed.

    Args:
        n_train: training rows.
        size: elements of a row.
    """
    return min(n_train, max(_SAMPLE_ROWS, _SAMPLE_ROWS_PER_ELEMENT * size))


def held_nbytes(n_rows: int, size: int, itemsize: int) -> int:
    """Memory for the rows of a hook."""
    return int(n_rows * (size * itemsize + 8) * _READING)


def _states() -> int:
    """Sums of units that exist at once: those that are merged, those of the workers, and one on its way."""
    return (os.cpu_count() or 1) + 2


def working_nbytes(
    kind: Kind, n_penalties: int, n_outputs: int, size: int, n_train: int, n_parts: int
) -> int:
    """Memory for what a hook is solved with, beside its rows."""
    if kind == "ridge":
        return 8 * (size + 2) ** 2 * ((n_parts + 1) * _states() + 3)
    if kind == "mean_difference":
        return 8 * size * 2 * n_parts * _states()
    sample = sample_rows(n_train, size) * size * 8 * 3
    factors = (n_penalties + 2) * (size + 1) ** 2 * 8
    search = n_penalties * n_outputs * (size + 1) * 8 * (30 + _states())
    return sample + factors + search


def groups_of(
    store: "CommittedStore",
    hooks: "Sequence[str]",
    kind: Kind,
    n_penalties: int,
    targets: Targets,
    memory: int | None,
) -> "Iterator[Group]":
    """Divide hooks into groups whose rows, or else whose sums, fit into memory.

    Raises:
        JobError: the memory is too little for one hook.
    """
    import torch

    budget = free_nbytes(torch.device("cpu")) // 2 if memory is None else memory
    split, n_classes = targets.split, len(targets.labels.classes)
    n_train, n_rows = int((split.parts >= 0).sum()), int((split.parts >= HELD_OUT).sum())
    n_outputs = n_classes if kind == "multinomial" else 1
    held: list[str] = []
    streamed: list[str] = []
    held_sum = streamed_sum = 0
    for hook in hooks:
        size = math.prod(store.array_of(hook).shape)
        rows = held_nbytes(n_rows, size, store[hook].dtype.itemsize)
        work = working_nbytes(kind, n_penalties, n_outputs, size, n_train, len(split.fractions))
        if work > budget:
            raise JobError(
                f"a probe of {hook} takes {work / 1e6:,.0f} MB for its sums, and memory is {budget / 1e6:,.0f} MB; "
                "allow more (memory, --memory), or give fewer l2"
            )
        if rows + work <= budget:
            # One hook is solved after the other, so that work is there once.
            if held and held_sum + rows + work > budget:
                yield Group(tuple(held), is_held=True)
                held, held_sum = [], 0
            held.append(hook)
            held_sum += rows
        else:
            if streamed and streamed_sum + work > budget:
                yield Group(tuple(streamed), is_held=False)
                streamed, streamed_sum = [], 0
            streamed.append(hook)
            streamed_sum += work
    for some, is_held in ((held, True), (streamed, False)):
        if some:
            yield Group(tuple(some), is_held=is_held)

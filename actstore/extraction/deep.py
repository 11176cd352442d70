"""The deep check: sampled rows of a store, computed once more as the worker computed them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.extraction.golden import positions_first, relative_error, tolerance
from actstore.store.plan import Plan

if TYPE_CHECKING:
    import torch

    from actstore.hooks.model import HookedModel

Stored = Callable[[str, Sequence[int]], NDArray[Any]]
"""Takes (hook name, rows of the plan); gives what is stored, [row, context_length, *shape] in the storage type."""


class TokenRows(Protocol):
    """An array of the store, or one in memory."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Mismatch:
    """A stored value that the model does not give."""

    hook: str
    sequence: int
    """Row of the plan."""
    error: float
    """`actstore.extraction.golden.relative_error` over the real positions; infinite if only one side is a number."""
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.hook} of sequence {self.sequence} is {self.error:.2g} away, relative to its size, from what the "
            f"model gives, and {self.allowed:.2g} is allowed"
        )


@dataclass(frozen=True)
class DeepCheck:
    """What the deep check found."""

    n_rows: int
    n_rows_bit_equal: int
    """Rows of which every hook is what was computed now, bit for bit, padding included. On another device, or with
    another version of torch or transformers, there may be none; and where the model is the same, all of them.
    """
    largest_errors: dict[str, float]
    """By hook, over the rows."""
    problems: tuple[Mismatch, ...]
    """In the order of rows, then of hooks."""


def deep_check(
    model: "HookedModel",
    plan: Plan,
    rows: Sequence[int],
    *,
    tokens: TokenRows,
    lengths: TokenRows,
    stored: Stored,
) -> DeepCheck:
    """Compute rows again, each within the batch that the worker had it in, and compare with what is stored.

    Bits are compared first. Where they differ, real positions must agree as well as two forwards of one row do:
    another device or another version rounds otherwise, and what is stored is right all the same.

    Costs one forward for each batch that has one of these rows in it, and the memory of the rows asked for of one
    batch.

    Args:
        model: that of the plan, in its dtype; it may have been loaded only as far as the hooks need.
        plan: of one run.
        rows: of the plan, in committed segments; in any order, each counted once.
        tokens: int32 [n_sequences, context_length] over the rows of the plan.
        lengths: int32 [n_sequences], real tokens in each.
        stored: reads the store.

    Raises:
        IndexError: the plan has no such row.
        StorageError: a row cannot be read.
        NotCommittedError: a row is not committed.
    """
    outside = [row for row in rows if not 0 <= row < plan.n_sequences]
    if outside:
        raise IndexError(f"row {outside[0]} is out of bounds for {plan.n_sequences} rows")
    largest = dict.fromkeys(plan.hook_names, 0.0)
    problems: list[Mismatch] = []
    n_rows = n_bit_equal = 0
    for start, stop, wanted in _batches(plan, rows):
        values = _computed(model, plan, tokens[start:stop], [row - start for row in wanted])
        is_equal = [True] * len(wanted)
        for hook, computed in values.items():
            found = as_tensor(stored(hook, wanted), plan.request.dtype)
            allowed = tolerance(model, hook)
            for index, row in enumerate(wanted):
                if _has_same_bits(found[index], computed[index]):
                    continue
                is_equal[index] = False
                length = int(lengths[row : row + 1][0])
                error = relative_error(found[index, :length], computed[index, :length])
                largest[hook] = max(largest[hook], error)
                if not error <= allowed:
                    problems.append(Mismatch(hook, row, error, allowed))
        n_rows += len(wanted)
        n_bit_equal += sum(is_equal)
    order = {hook: index for index, hook in enumerate(plan.hook_names)}
    problems.sort(key=lambda problem: (problem.sequence, order[problem.hook]))
    return DeepCheck(n_rows, n_bit_equal, largest, tuple(problems))


def as_tensor(values: NDArray[Any], dtype: str) -> "torch.Tensor":
    """A copy of values in the storage type as a tensor of their real one."""
    import torch

    real: torch.dtype = getattr(torch, dtype)
    return torch.from_numpy(np.array(values, order="C").view(np.uint8)).view(real).view(values.shape)


def _batches(plan: Plan, rows: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """(first row, end, rows wanted of it) for each batch; segments are cut into batches from their first row on."""
    size = plan.request.batch_size
    by_start: dict[int, list[int]] = {}
    for row in sorted(set(rows)):
        first = row - row % plan.segment_size
        by_start.setdefault(first + (row - first) // size * size, []).append(row)
    for start, wanted in by_start.items():
        segment = plan.segment(start // plan.segment_size)
        yield start, min(start + size, segment.stop), wanted


def _computed(
    model: "HookedModel", plan: Plan, tokens: NDArray[Any], wanted: Sequence[int]
) -> "dict[str, torch.Tensor]":
    """By hook, [len(wanted), context_length, *shape] in host memory."""
    import torch

    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    # As in the worker: the last batch is filled up with its last row.
    missing = plan.request.batch_size - len(ids)
    ids = torch.cat([ids, ids[-1:].expand(missing, -1)])
    values: dict[str, torch.Tensor] = {}

    def take(hook: str, value: "torch.Tensor") -> None:
        values[hook] = positions_first(hook, value)[list(wanted)].cpu()

    model.run(ids, plan.hook_names, take)
    return values


def _has_same_bits(left: "torch.Tensor", right: "torch.Tensor") -> bool:
    import torch

    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))

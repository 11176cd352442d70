"""The deep check: sampled rows of a store, computed once more as the worker computed them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.extraction.batches import filled_up
from actstore.extraction.checking.agreement import Deviation, deviation, distances, is_mixture
from actstore.extraction.checking.golden import recomputed, recomputed_alone
from actstore.store.format.plan import Plan

if TYPE_CHECKING:
    import torch

    from actstore.extraction.checking.reference import Reference

_BITS_OF_ANOTHER_MACHINE = 0.5
"""Share of the positions of a row that have other bits if other kernels computed it."""
_ROUTED_ALIKE = 0.9
"""Share of the positions of a row that must have been sent to the same experts on other hardware."""
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
    position: int
    """The one that is furthest away."""
    error: float
    """`actstore.extraction.checking.agreement.distances` there; infinite if only one side is a number."""
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.hook} of sequence {self.sequence} is {self.error:.2g} away at position {self.position}, relative "
            f"to its size, from what the model gives, and {self.allowed:.2g} is allowed"
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
    """By hook, over the real positions of the rows, against the forward of the same batch."""
    problems: tuple[Mismatch, ...]
    """In the order of rows, then of hooks."""


def deep_check(
    reference: "Reference",
    plan: Plan,
    rows: Sequence[int],
    *,
    tokens: TokenRows,
    lengths: TokenRows,
    stored: Stored,
) -> DeepCheck:
    """Compute rows again, each within the batch that the worker had it in, and compare with what is stored.

    Bits are compared first. Where they differ, every real position must be as near as two forwards of one row are:
    another device or another version rounds otherwise, and what is stored is right all the same.

    Costs one forward for each batch that has one of these rows in it, one more for each row whose bits differ, and the
    memory of the rows asked for of one batch.

    Args:
        reference: the model of the plan, in its dtype.
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
    hooks = list(plan.hook_names)
    largest = dict.fromkeys(hooks, 0.0)
    problems: list[Mismatch] = []
    n_rows = n_bit_equal = 0
    for start, stop, wanted in _batches(plan, rows):
        batch = filled_up(tokens[start:stop], plan.request.batch_size)
        computed = recomputed(reference, batch, [row - start for row in wanted], hooks)
        values = {hook: as_tensor(stored(hook, wanted), plan.request.dtype) for hook in hooks}
        for index, row in enumerate(wanted):
            is_other = [
                hook for hook in hooks if not _has_same_bits(values[hook][index], computed[hook][index])
            ]
            n_bit_equal += not is_other
            if not is_other:
                continue
            length = int(lengths[row : row + 1][0])
            alone = recomputed_alone(reference, batch[row - start], length, is_other)
            for hook in is_other:
                real, in_batch = values[hook][index, :length], computed[hook][index, :length].to("cpu")
                largest[hook] = max(largest[hook], float(distances(real, in_batch).max()))
                wrong = _deviation(reference, hook, real, in_batch, alone[hook])
                if wrong is not None:
                    problems.append(Mismatch(hook, row, wrong.position, wrong.error, wrong.allowed))
        n_rows += len(wanted)
    order = {hook: index for index, hook in enumerate(hooks)}
    problems.sort(key=lambda problem: (problem.sequence, order[problem.hook]))
    return DeepCheck(n_rows, n_bit_equal, largest, tuple(problems))


def _deviation(
    reference: "Reference",
    hook: str,
    values: "torch.Tensor",
    in_batch: "torch.Tensor",
    alone: "torch.Tensor",
) -> Deviation | None:
    """What is wrong with a row, [position, *shape] each.

    Whether it was computed by other kernels shows in its bits: most positions have others then. In a mixture, a few
    positions may then have been sent to other experts, which no forward here tells apart from damage.
    """
    import torch

    is_routed = is_mixture(reference.model.base.config)
    errors = distances(values, in_batch)
    is_other_machine = bool((errors > 0).double().mean() > _BITS_OF_ANOTHER_MACHINE)
    wrong = deviation(
        hook,
        values,
        in_batch,
        alone,
        dtype=reference.dtype,
        is_mixture=is_routed,
        is_other_machine=is_other_machine,
    )
    if wrong is None or not (is_routed and is_other_machine):
        return wrong
    return None if torch.quantile(errors, _ROUTED_ALIKE) <= wrong.allowed else wrong


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


def _has_same_bits(left: "torch.Tensor", right: "torch.Tensor") -> bool:
    import torch

    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    right = right.to(left.device)
    bits = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))

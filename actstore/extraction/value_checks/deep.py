"""The deep check: computing sampled rows of a store again as the worker computed them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.extraction.batches import filled_up
from actstore.extraction.value_checks.agreement import Deviation, deviation, distances, is_mixture
from actstore.extraction.value_checks.golden import recompute, recompute_alone
from actstore.store.format.plan import Plan

if TYPE_CHECKING:
    import torch

    from actstore.extraction.value_checks.reference import Reference

_BITS_OF_ANOTHER_MACHINE = 0.5
"""Share of the positions of a row with other bits above which other kernels must have computed it."""
_ROUTED_ALIKE = 0.9
"""Share of the positions of a row that must have been sent to the same experts on other hardware."""
Stored = Callable[[str, Sequence[int]], NDArray[Any]]
"""Takes (hook name, rows of the plan) and returns stored values [row, context_length, *shape] in the storage type."""


class TokenRows(Protocol):
    """An array of the store, or one in memory, that can be sliced by rows."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Mismatch:
    """A stored value that differs from what the model computes."""

    hook: str
    sequence: int
    """Row of the plan."""
    position: int
    """The position with the largest error."""
    error: float
    """Distance there, see `actstore.extraction.value_checks.agreement.distances`; infinite if one side alone is finite.
    """
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.hook} of sequence {self.sequence} is {self.error:.2g} away at position {self.position}, relative "
            f"to its size, from what the model gives, and {self.allowed:.2g} is allowed"
        )


@dataclass(frozen=True)
class DeepCheck:
    """The result of the deep check."""

    n_rows: int
    n_rows_bit_equal: int
    """Number of rows whose hooks all equal what was computed now, bit for bit, padding included. On another device, or
    with another version of torch or transformers, that may be none; where all is the same, it is every row.
    """
    largest_errors: dict[str, float]
    """Largest error by hook over the real positions of the rows, compared with the forward of the same batch."""
    problems: tuple[Mismatch, ...]
    """Values that are wrong, in the order of rows, then of hooks."""


def deep_check(
    reference: "Reference",
    plan: Plan,
    rows: Sequence[int],
    *,
    tokens: TokenRows,
    lengths: TokenRows,
    stored: Stored,
) -> DeepCheck:
    """Compute rows again, each in the batch that the worker computed it in, and compare them with what is stored.

    Bits are compared first. Where they differ, every real position must be as near as two forwards of one row are:
    another device or version rounds differently, and what is stored may still be right.

    The cost is one forward for each batch with one of these rows, one more for each row whose bits differ, and the
    memory of these rows of one batch.

    Args:
        reference: the model of the plan, in its dtype.
        plan: plan of the run.
        rows: rows of the plan in committed segments, in any order; each is counted once.
        tokens: int32 [n_sequences, context_length] over the rows of the plan.
        lengths: int32 [n_sequences], number of real tokens in each row.
        stored: reads the store.

    Raises:
        IndexError: the plan has no such row.
        StorageError: a row cannot be read.
        NotCommittedError: a row is not committed.
    """
    outside = [row for row in rows if not 0 <= row < plan.n_sequences]
    if outside:
        raise IndexError(f"sequence {outside[0]} is out of bounds for {plan.n_sequences} sequences")
    hooks = list(plan.hook_names)
    largest = dict.fromkeys(hooks, 0.0)
    problems: list[Mismatch] = []
    n_rows = n_bit_equal = 0
    for start, stop, wanted in _batches(plan, rows):
        batch = filled_up(tokens[start:stop], plan.request.batch_size)
        computed = recompute(reference, batch, [row - start for row in wanted], hooks)
        values = {hook: as_tensor(stored(hook, wanted), plan.request.dtype) for hook in hooks}
        for index, row in enumerate(wanted):
            is_other = [
                hook for hook in hooks if not _has_same_bits(values[hook][index], computed[hook][index])
            ]
            n_bit_equal += not is_other
            if not is_other:
                continue
            length = int(lengths[row : row + 1][0])
            alone = recompute_alone(reference, batch[row - start], length, is_other)
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
    """The position where a row is wrong, or None; values are [position, *shape].

    If other kernels computed the row, most positions have other bits. In a mixture, rounding may then have sent a few
    positions to other experts, which a forward here cannot tell from damage.
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
    """A copy of values in the storage type as a tensor of their own dtype."""
    import torch

    real: torch.dtype = getattr(torch, dtype)
    return torch.from_numpy(np.array(values, order="C").view(np.uint8)).view(real).view(values.shape)


def _batches(plan: Plan, rows: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """(first row, end, rows to check in it) of each batch; segments are cut into batches from their first row on."""
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

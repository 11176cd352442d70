"""The deep check: computing sampled rows of a store again as the worker computed them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.extraction.batches import filled_up, stored_entries
from actstore.extraction.value_checks.agreement import Deviation, deviation, distances, is_mixture
from actstore.extraction.value_checks.golden import entries_of, recompute, recompute_alone
from actstore.store.format.batches import Batch
from actstore.store.format.plan import Plan, Segment
from actstore.store.reading.segment_tokens import SegmentTokens

if TYPE_CHECKING:
    import torch

    from actstore.extraction.value_checks.reference import Reference

_BITS_OF_ANOTHER_MACHINE = 0.5
"""Share of the positions of a row with other bits above which other kernels must have computed it."""
_ROUTED_ALIKE = 0.9
"""Share of the positions of a row that must have been sent to the same experts on other hardware."""
Stored = Callable[[str, Sequence[int]], NDArray[Any]]
"""Takes (hook name, rows of the plan) and returns stored values [row, entry, *shape] in the storage type."""


@dataclass(frozen=True)
class Mismatch:
    """A stored value that differs from what the model computes."""

    hook: str
    sequence: int
    """Row of the plan."""
    position: int
    """The position with the largest error; the slot, where only chosen positions are stored."""
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
    tokens: Callable[[Segment], SegmentTokens],
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
        tokens: reads the tokens of a segment.
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
    for segment, of_segment, batch, in_batch in _batches(plan, rows, tokens):
        wanted = [segment.start + int(batch.rows[place]) for place in in_batch]
        ids = filled_up(of_segment.tokens, batch, plan.request.batch_size)
        computed = _entries(plan, of_segment, batch, in_batch, recompute(reference, ids, in_batch, hooks))
        values = {hook: as_tensor(stored(hook, wanted), plan.request.dtype) for hook in hooks}
        for index, (row, place) in enumerate(zip(wanted, in_batch, strict=True)):
            is_other = [
                hook for hook in hooks if not _has_same_bits(values[hook][index], computed[hook][index])
            ]
            n_bit_equal += not is_other
            count = int(of_segment.counts[row - segment.start])
            if not is_other or not count:
                continue
            length = int(of_segment.lengths[row - segment.start])
            chosen = of_segment.entries(row - segment.start)
            alone = recompute_alone(reference, ids[place], length, is_other)
            for hook in is_other:
                real, expected = values[hook][index, :count], computed[hook][index, :count].to("cpu")
                largest[hook] = max(largest[hook], float(distances(real, expected).max()))
                by_itself = entries_of(hook, alone[hook], chosen, plan.context_length)
                wrong = _deviation(reference, hook, real, expected, by_itself)
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


def _batches(
    plan: Plan, rows: Sequence[int], tokens: Callable[[Segment], SegmentTokens]
) -> Iterator[tuple[Segment, SegmentTokens, Batch, list[int]]]:
    """(segment, its tokens, batch, places of rows to check in it) of each batch with such rows."""
    by_segment: dict[int, set[int]] = {}
    for row in sorted(set(rows)):
        index = row // plan.segment_size
        by_segment.setdefault(index, set()).add(row - plan.segment(index).start)
    for index, wanted in by_segment.items():
        segment = plan.segment(index)
        of_segment = tokens(segment)
        for batch in of_segment.batches:
            numbers = batch.rows.tolist()
            in_batch = [place for place, row in enumerate(numbers) if row in wanted]
            if in_batch:
                # In stored order, so that neighbours are read together.
                yield segment, of_segment, batch, sorted(in_batch, key=numbers.__getitem__)


def _entries(
    plan: Plan, of_segment: SegmentTokens, batch: Batch, places: list[int], values: "dict[str, torch.Tensor]"
) -> "dict[str, torch.Tensor]":
    """Values [row, position, *shape] of some places of a batch as the store has them, [row, plan.width, *shape]."""
    import torch

    positions = of_segment.positions
    chosen = None if positions is None else torch.from_numpy(positions[batch.rows[places]])
    of_store = {
        hook: stored_entries(hook, value, chosen, plan.context_length) for hook, value in values.items()
    }
    return {
        hook: torch.cat(
            [value, value.new_zeros(len(value), plan.width - value.shape[1], *value.shape[2:])], dim=1
        )
        for hook, value in of_store.items()
    }


def _has_same_bits(left: "torch.Tensor", right: "torch.Tensor") -> bool:
    import torch

    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    right = right.to(left.device)
    bits = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))

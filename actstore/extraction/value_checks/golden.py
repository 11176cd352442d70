"""The golden check: comparing one row that a worker captured with the plain Hugging Face forward of it."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import ModelError
from actstore.extraction.batches import stored_entries, with_all_sources
from actstore.extraction.value_checks.agreement import deviation, is_close, is_mixture, relative_error
from actstore.extraction.value_checks.plain_forward import is_length_in_rotation, plain_values
from actstore.extraction.value_checks.reference import Kind, Reference
from actstore.store.format.plan import Segment
from actstore.store.records.commit import Golden

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def sampled_row(tokens_sha256: str, segment: Segment, counts: "NDArray[Any] | None" = None) -> int:
    """The row of a segment that is checked. It is drawn by a hash, and so the same wherever the segment is computed.

    Args:
        tokens_sha256: from the plan.
        segment: the segment.
        counts: entries in use of each of its sequences, [n_sequences]; None if all have some. If the row that was drawn
            has none, the next one that has some takes its place, the first of the segment after the last.
    """
    digest = hashlib.sha256(f"{tokens_sha256}:{segment.index}".encode()).digest()
    drawn = int.from_bytes(digest[:8], "little") % segment.n_sequences
    if counts is not None:
        rows = (drawn + np.arange(segment.n_sequences)) % segment.n_sequences
        drawn = int(rows[np.argmax(counts[rows] > 0)])
    return segment.start + drawn


@dataclass(frozen=True, eq=False)
class Expected:
    """Values of one row in the plain forward as a store has them, [entry, *shape] by hook."""

    alone: "Mapping[str, torch.Tensor]"
    """Values in a forward of the row alone."""
    in_batch: "Callable[[], Mapping[str, torch.Tensor]]"
    """Values in a forward of the batch that the row was captured in. With the model that captures as the reference they
    are computed by the first call.
    """
    dtype: str
    is_mixture: bool
    reference: Kind
    entry: str = "position"
    """What an entry is called: ``position``, or ``slot`` where only chosen positions are stored."""


def compute_expected(
    reference: Reference,
    tokens: "NDArray[Any]",
    row: int,
    length: int,
    hooks: Sequence[str],
    *,
    positions: "NDArray[Any] | None" = None,
    context_length: int | None = None,
) -> Expected:
    """Compute one row twice, in its batch and alone.

    The cost is one forward of the batch and one of the row, and the same again if there are hooks that the plain
    forward does not show. The batch waits until it is needed, if the reference is the model that captures.

    Args:
        reference: the model of the plain forward.
        tokens: int32 [batch, width], the batch as the worker runs it.
        row: row of the batch that is checked.
        length: number of its real tokens; the rest is padding.
        hooks: canonical names.
        positions: positions of the row that are stored, [n]; None for all.
        context_length: number of sources in patterns and scores of the store; None for the width of the batch.
    """
    n_sources = context_length or tokens.shape[1]
    alone = recompute_alone(reference, tokens[row], length, hooks)

    @functools.cache
    def in_batch() -> "dict[str, torch.Tensor]":
        values = recompute(reference, tokens, [row], hooks)
        return {
            hook: entries_of(hook, value[0, :length].cpu(), positions, n_sources)
            for hook, value in values.items()
        }

    if reference.kind == "whole":
        computed = in_batch()  # now: the whole model gives its memory to the segment
    return Expected(
        {hook: entries_of(hook, values, positions, n_sources) for hook, values in alone.items()},
        in_batch if reference.kind == "loaded" else lambda: computed,
        reference.dtype,
        is_mixture(reference.model.base.config),
        reference.kind,
        "position" if positions is None else "slot",
    )


def entries_of(
    hook: str, values: "torch.Tensor", positions: "NDArray[Any] | None", context_length: int
) -> "torch.Tensor":
    """Entries of one row as a store has them, [entry, *shape], of its values [position, *shape].

    Args:
        hook: canonical name.
        values: values at all real positions.
        positions: positions that are stored; None for all.
        context_length: number of sources in the store.
    """
    import torch

    chosen = None if positions is None else torch.from_numpy(positions.astype("int64"))[None]
    return stored_entries(hook, values[None], chosen, context_length)[0]


def golden(of_row: Expected, captured: "Mapping[str, torch.Tensor]", sequence: int) -> Golden:
    """Compare the captured values of one row with those of the plain forward.

    Args:
        of_row: values of the plain forward.
        captured: the row as it goes into the store, [entry, *shape] by hook.
        sequence: number of the row in the store.

    Raises:
        ModelError: a hook is off by more than rounding can explain.
    """
    errors: dict[str, float] = {}
    for hook, values in captured.items():
        alone = of_row.alone[hook]
        real = values[: len(alone)]
        if not len(alone):  # no sequence of the segment has an entry
            errors[hook] = 0.0
            continue
        if of_row.reference == "loaded" and is_close(hook, real, alone, dtype=of_row.dtype):
            wrong = None  # whatever a forward of the batch gave, such an error would be allowed
        else:
            in_batch = of_row.in_batch()[hook]
            wrong = deviation(hook, real, in_batch, alone, dtype=of_row.dtype, is_mixture=of_row.is_mixture)
        if wrong is not None:
            raise ModelError(
                f"{hook} of sequence {sequence} was captured {wrong.error:.2g} away at {of_row.entry} "
                f"{wrong.position}, relative to its size, from what the plain Hugging Face forward gives, and "
                f"{wrong.allowed:.2g} is allowed in {of_row.dtype}; the segment was not committed, for it would be "
                "wrong: try another device, batch_size or attention implementation, or other versions of torch and "
                "transformers"
            )
        errors[hook] = relative_error(real, alone)
    return Golden(sequence=sequence, errors=errors, reference=of_row.reference)


def recompute(
    reference: Reference, tokens: "NDArray[Any]", rows: Sequence[int], hooks: Sequence[str]
) -> "dict[str, torch.Tensor]":
    """Values of rows of a batch from the plain forward of that batch, [row, position, *shape] by hook.

    Args:
        reference: the model.
        tokens: int32 [batch, width].
        rows: rows of the batch.
        hooks: canonical names.
    """
    import torch

    ids = torch.from_numpy(tokens.astype("int64"))
    return plain_values(reference.model, ids, hooks, rows=rows, has_streams=reference.kind == "whole")


def recompute_alone(
    reference: Reference, tokens: "NDArray[Any]", length: int, hooks: Sequence[str]
) -> "dict[str, torch.Tensor]":
    """Values of one row from a plain forward of this row without its padding, [length, *shape] by hook in host memory.

    Args:
        reference: the model.
        tokens: int32 [width].
        length: number of real tokens.
        hooks: canonical names.
    """
    import torch

    used = tokens if is_length_in_rotation(reference.model.base.config) else tokens[:length]
    values = plain_values(reference.model, torch.from_numpy(used.astype("int64"))[None], hooks)
    return {
        hook: with_all_sources(hook, value[0, :length], len(tokens)).cpu() for hook, value in values.items()
    }

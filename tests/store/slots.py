"""Two small stores of one ragged text: all positions of it, and the same values at chosen positions alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.storage.blobs import Blobs
from actstore.store.format.batches import batches_of
from actstore.store.format.plan import HookArray, Plan
from actstore.store.format.shard import encode
from actstore.store.format.sizes import Sizes
from actstore.store.records.commit import (
    CommitRecord,
    Golden,
    TokensRecord,
    commit_key,
    has_golden,
    plan_key,
    tokens_key,
)
from actstore.store.records.shard_writer import put
from actstore.store.records.zarr_documents import zarr_documents
from actstore.store.statistics.moments import has_statistics, recompute
from actstore.store.statistics.norms import side_by_side
from tests.store.arrays import encoded
from tests.store.example import ENVIRONMENT, HOOKS, Columns, example_plan, write_array

RESID = HOOKS[0]


@dataclass(frozen=True)
class Ragged:
    """A text of sequences of different lengths, and what is stored of it."""

    lengths: NDArray[np.int32]
    """[n]."""
    chosen: list[list[int]]
    """Chosen positions of each sequence, ascending."""
    tokens: NDArray[np.int32]
    """[n, L]; padding holds 0."""
    documents: NDArray[np.int64]
    offsets: NDArray[np.int32]
    values: Columns
    """[n, L, ...] by hook."""

    @property
    def n_slots(self) -> int:
        return max(map(len, self.chosen))

    @property
    def positions(self) -> NDArray[np.int32]:
        """[n, n_slots], -1 for slots that are not in use."""
        rows = [row + [-1] * (self.n_slots - len(row)) for row in self.chosen]
        return np.array(rows, np.int32)


def ragged(
    lengths: Sequence[int], chosen: Sequence[Sequence[int]], context_length: int, seed: int = 0
) -> Ragged:
    """A text of these lengths; one position at least must be chosen. Values are normal numbers."""
    rng = np.random.default_rng(seed)
    n = len(lengths)
    is_real = np.arange(context_length) < np.array(lengths)[:, None]
    values = {
        hook.name: rng.standard_normal((n, context_length, *hook.shape)).astype("<f4")
        for hook in _hooks(context_length)
    }
    return Ragged(
        lengths=np.array(lengths, np.int32),
        chosen=[sorted(row) for row in chosen],
        tokens=np.where(is_real, rng.integers(1, 9, (n, context_length)), 0).astype("<i4"),
        documents=np.where(is_real, np.arange(n)[:, None], -1).astype("<i8"),
        offsets=np.where(is_real, np.arange(context_length), -1).astype("<i4"),
        values=values,
    )


def _hooks(context_length: int) -> tuple[HookArray, ...]:
    return (
        *example_plan().request.hooks,
        HookArray(
            name="blocks.1.attn.hook_pattern", shape=(2, context_length), axes=("head", "source_position")
        ),
    )


def ragged_plan(text: Ragged, *, is_chosen: bool, segment_size: int = 4, **request: Any) -> Plan:
    """The plan of a store of all positions, or of the chosen ones."""
    plan = example_plan()
    n, length = text.tokens.shape
    tokens = plan.request.tokens.model_copy(
        update={"packing": "document", "context_length": length, "pad_token": 0}
        | ({"positions": "every:2"} if is_chosen else {})
    )
    changed = plan.request.model_copy(
        update={"tokens": tokens, "hooks": _hooks(length), "batch_size": segment_size} | request
    )
    return Plan(
        run=plan.run,
        tokens_of=plan.tokens_of,
        request=changed,
        n_sequences=n,
        n_tokens=int(text.lengths.sum()),
        n_documents=n,
        tokens_sha256=hashlib.sha256(text.tokens.tobytes()).hexdigest(),
        segment_size=segment_size,
        n_slots=text.n_slots if is_chosen else None,
        n_rows=sum(map(len, text.chosen)) if is_chosen else None,
        norms=True,
    )


def slots_of(text: Ragged, values: NDArray[Any]) -> NDArray[Any]:
    """What is stored in slots of values [n, L, ...]."""
    there = np.zeros((len(values), text.n_slots, *values.shape[2:]), values.dtype)
    for row, positions in enumerate(text.chosen):
        there[row, : len(positions)] = values[row, positions]
    return there


def write_ragged(blobs: Blobs, text: Ragged, plan: Plan, segments: Sequence[int] | None = None) -> Plan:
    """Write a store of this text."""
    is_chosen = plan.n_slots is not None
    blobs.create(plan_key(plan.run), [plan.to_bytes()])
    for key, data in zarr_documents(plan).items():
        blobs.create(key, [data])
    arrays: dict[str, NDArray[Any]] = {
        "tokens": text.tokens,
        "lengths": text.lengths,
        "documents": text.documents,
        "offsets": text.offsets,
        "positions": text.positions,
    }
    records = [
        record
        for layout in plan.token_arrays()
        for record in write_array(blobs, layout, arrays[layout.path], range(layout.n_shards))
    ]
    blobs.create(tokens_key(plan.run), [TokensRecord(shards=tuple(records)).to_bytes()])
    values = {name: slots_of(text, some) if is_chosen else some for name, some in text.values.items()}
    for index in range(plan.n_segments) if segments is None else segments:
        _commit(blobs, text, plan, index, values)
    return plan


def _commit(blobs: Blobs, text: Ragged, plan: Plan, index: int, values: Columns) -> None:
    segment = plan.segment(index)
    span = slice(segment.start, segment.stop)
    sizes = Sizes.of(text.lengths, text.positions if plan.n_slots else None)[span]
    batches = batches_of(plan.request, sizes.lengths)
    of_hooks = {
        hook.name: recompute(hook, values[hook.name][span], plan.request.dtype, sizes.counts, batches)
        for hook in plan.request.hooks
        if has_statistics(hook)
    }
    shards = {
        hook.name: put(
            blobs, plan.activations(hook), index, encoded(plan.activations(hook), index, values[hook.name])
        ).record
        for hook in plan.request.hooks
    }
    side = side_by_side(plan, index, {name: norms for name, (_, norms) in of_hooks.items()})
    norms = put(blobs, plan.norm_array(), index, encode(plan.norm_array(), index, side)).record
    record = CommitRecord(
        segment=index,
        n_sequences=segment.n_sequences,
        n_tokens=int(sizes.lengths.sum()),
        shards=shards,
        norms=norms,
        statistics={name: statistics for name, (statistics, _) in of_hooks.items()},
        golden=Golden(sequence=segment.start, errors={}) if has_golden(index) else None,
        environment=ENVIRONMENT,
    )
    assert blobs.create(commit_key(plan.run, index), [record.to_bytes()])

"""Checking one committed segment: its record, its shards, and whether the statistics are those of the values."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.store.checking.inspection import Inspection
from actstore.store.format.plan import HookArray, Plan
from actstore.store.records.commit import CommitRecord, commit_key, has_golden, mismatch
from actstore.store.statistics.hook_statistics import HookStatistics
from actstore.store.statistics.moments import agree, has_statistics, recomputed
from actstore.store.statistics.norms import difference
from actstore.store.statistics.not_finite import not_finite


@dataclass(frozen=True)
class CheckedSegment:
    """What is known of one segment."""

    index: int
    record: CommitRecord | None
    """None if it cannot be read, or is not that of the segment: then nobody vouches for its shards."""
    is_sound: bool
    """Whether all that the record says can be used."""


def check_segment(
    inspection: Inspection, plan: Plan, index: int, lengths: NDArray[Any] | None
) -> CheckedSegment:
    """Check the record of a segment and every shard that it names.

    Args:
        inspection: takes what is found.
        plan: of the run.
        index: number of the segment; it has a record.
        lengths: [n_sequences] real tokens of each row; None where they are not known, and statistics cannot be
            computed again.
    """
    key = commit_key(plan.run, index)
    where = {"run": plan.run, "segment": index}
    record = inspection.document(CommitRecord, key, **where)
    problem = None if record is None else mismatch(plan, index, record)
    if record is None or problem is not None:
        if problem is not None:
            inspection.found(key, f"is damaged: {problem}", **where)
        return CheckedSegment(index, None, is_sound=False)
    segment = plan.segment(index)
    here = None if lengths is None else lengths[segment.start : segment.stop]
    problems = _contradictions(plan, index, record, here)
    for problem in problems:
        inspection.found(key, problem, **where)
    is_sound = not problems
    norms = None
    if record.norms is not None:
        norms = inspection.shard(plan.norm_array(), index, record.norms, **where)
    for hook in plan.request.hooks:
        stored = record.statistics.get(hook.name)
        if stored is not None and has_statistics(hook):
            is_sound &= _fits(inspection, plan, index, hook, stored)
        rows = inspection.shard(plan.activations(hook), index, record.shards[hook.name], **where)
        if rows is None or here is None:
            continue
        n_not_finite = 0
        if not has_statistics(hook):
            n_not_finite = count_not_finite(hook, rows, plan.request.dtype, here, plan.request.batch_size)
        elif stored is not None and is_sound:
            is_sound &= _is_of_values(inspection, plan, index, hook, stored, norms, rows, here)
            n_not_finite = stored.n_not_finite
        if n_not_finite:
            inspection.found(
                plan.activations(hook).key(index),
                f"holds NaN or infinity in {n_not_finite} tokens, as the model computed them",
                severity="warning",
                **where,
            )
    return CheckedSegment(index, record, is_sound)


def _contradictions(plan: Plan, index: int, record: CommitRecord, lengths: NDArray[Any] | None) -> list[str]:
    """What in a record cannot be, but for the numbers of its statistics."""
    found = []
    if lengths is not None and record.n_tokens != int(lengths.sum()):
        found.append(f"counts {record.n_tokens} tokens, and there are {int(lengths.sum())}")
    if (record.golden is not None) != (has_golden(index) and not plan.request.model.is_imported):
        found.append("has a golden row where none belongs, or none where one does")
    segment = plan.segment(index)
    if record.golden is not None and not segment.start <= record.golden.sequence < segment.stop:
        found.append(f"has a golden row of another segment: sequence {record.golden.sequence}")
    counted = {hook.name for hook in plan.request.hooks if has_statistics(hook)}
    if record.statistics.keys() != counted:
        found.append("does not have the statistics of the hooks of the plan")
    return found


def count_not_finite(
    hook: HookArray, rows: NDArray[Any], dtype: str, lengths: NDArray[Any], batch_size: int
) -> int:
    """Real tokens with NaN or infinity; -Inf is what attention scores hold where a position does not see another."""
    found = not_finite(hook.name, rows, dtype, lengths, first_sequence=0, batch_size=batch_size)
    return found.n_tokens


def _fits(inspection: Inspection, plan: Plan, index: int, hook: HookArray, stored: HookStatistics) -> bool:
    """Whether statistics are such as a hook can have at all."""
    key = commit_key(plan.run, index)
    try:
        stored.check(hook.shape, key)
    except StorageError as error:
        inspection.failed(key, error, run=plan.run, segment=index)
        return False
    return True


def _is_of_values(
    inspection: Inspection,
    plan: Plan,
    index: int,
    hook: HookArray,
    stored: HookStatistics,
    norms: NDArray[np.float32] | None,
    rows: NDArray[Any],
    lengths: NDArray[Any],
) -> bool:
    """Whether statistics are those of the stored values; norms that are not are noted, too.

    Args:
        norms: [n, hooks, L] as they are stored; None where there are none, or they are damaged.
    """
    request = plan.request
    statistics, own_norms = recomputed(
        hook, rows, request.dtype, lengths, request.batch_size, covariance=request.covariance
    )
    if norms is not None and hook.has_norms:
        layout = plan.norm_array()
        there = np.ascontiguousarray(norms[:, layout.hooks.index(hook.name)])
        problem = difference(there, own_norms)
        if problem is not None:
            inspection.found(
                layout.key(index),
                f"has other norms of {hook.name} than its values: {problem}",
                run=plan.run,
                segment=index,
            )
    problem = agree(stored, statistics)
    if problem is None:
        return True
    inspection.found(
        commit_key(plan.run, index),
        f"has other statistics of {hook.name} than its values: {problem}",
        run=plan.run,
        segment=index,
    )
    return False

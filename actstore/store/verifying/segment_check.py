"""Checking a committed segment: its record, its shards, and whether the statistics are those of the values."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.store.format.batches import batches_of
from actstore.store.format.plan import HookArray, Plan
from actstore.store.format.sizes import Sizes
from actstore.store.records.commit import CommitRecord, commit_key, has_golden, mismatch
from actstore.store.statistics.hook_statistics import HookStatistics
from actstore.store.statistics.moments import agree, has_statistics, recompute
from actstore.store.statistics.norms import difference
from actstore.store.statistics.not_finite import not_finite
from actstore.store.verifying.inspection import Inspection


@dataclass(frozen=True)
class CheckedSegment:
    """The result of checking a segment."""

    index: int
    record: CommitRecord | None
    """None if the record cannot be read, or belongs to another segment, so that nothing vouches for the shards."""
    is_sound: bool
    """Whether everything that the record says can be used."""


def check_segment(inspection: Inspection, plan: Plan, index: int, sizes: Sizes | None) -> CheckedSegment:
    """Check the record of a segment and every shard that it names.

    Args:
        inspection: collects the findings.
        plan: the plan of the run.
        index: the number of the segment, which has a record.
        sizes: how much of each sequence of the plan there is; None if it is not known, so that statistics cannot be
            computed again.
    """
    key = commit_key(plan.run, index)
    where = {"run": plan.run, "segment": index}
    record = inspection.document(CommitRecord, key, **where)
    problem = None if record is None else mismatch(plan, index, record)
    if record is None or problem is not None:
        if problem is not None:
            inspection.report(key, f"is damaged: {problem}", **where)
        return CheckedSegment(index, None, is_sound=False)
    segment = plan.segment(index)
    here = None if sizes is None else sizes[segment.start : segment.stop]
    problems = _contradictions(plan, index, record, None if here is None else here.lengths)
    for problem in problems:
        inspection.report(key, problem, **where)
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
            n_not_finite = count_not_finite(
                hook, rows, plan.request.dtype, here.counts, plan.request.batch_size
            )
        elif stored is not None and is_sound:
            is_sound &= _is_of_values(inspection, plan, index, hook, stored, norms, rows, here)
            n_not_finite = stored.n_not_finite
        if n_not_finite:
            inspection.report(
                plan.activations(hook).key(index),
                f"holds NaN or infinity in {n_not_finite} tokens, as the model computed them",
                severity="warning",
                **where,
            )
    return CheckedSegment(index, record, is_sound)


def _contradictions(plan: Plan, index: int, record: CommitRecord, lengths: NDArray[Any] | None) -> list[str]:
    """The contradictions in a record, except in the figures of its statistics."""
    problems = []
    if lengths is not None and record.n_tokens != int(lengths.sum()):
        problems.append(f"counts {record.n_tokens} tokens, and there are {int(lengths.sum())}")
    if (record.golden is not None) != (has_golden(index) and not plan.request.model.is_imported):
        problems.append("has a golden sequence where none belongs, or none where one does")
    segment = plan.segment(index)
    if record.golden is not None and not segment.start <= record.golden.sequence < segment.stop:
        problems.append(f"has a golden sequence of another segment: sequence {record.golden.sequence}")
    counted = {hook.name for hook in plan.request.hooks if has_statistics(hook)}
    if record.statistics.keys() != counted:
        problems.append("does not have the statistics of the hooks of the plan")
    return problems


def count_not_finite(
    hook: HookArray, rows: NDArray[Any], dtype: str, counts: NDArray[Any], batch_size: int
) -> int:
    """Number of real tokens with NaN or infinity; -Inf in attention scores masks, and does not count."""
    tokens = not_finite(hook.name, rows, dtype, counts, first_sequence=0, batch_size=batch_size)
    return tokens.n_tokens


def _fits(inspection: Inspection, plan: Plan, index: int, hook: HookArray, stored: HookStatistics) -> bool:
    """Whether statistics are possible for the hook."""
    key = commit_key(plan.run, index)
    try:
        stored.check(hook.shape, key)
    except StorageError as error:
        inspection.report_error(key, error, run=plan.run, segment=index)
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
    sizes: Sizes,
) -> bool:
    """Whether statistics are those of the stored values. Norms that are not are reported, too.

    Args:
        norms: the stored norms, [n, hooks, entries]; None if there are none, or they are damaged.
    """
    request = plan.request
    statistics, own_norms = recompute(
        hook,
        rows,
        request.dtype,
        sizes.counts,
        batches_of(request, sizes.lengths),
        covariance=request.covariance,
    )
    if norms is not None and hook.has_norms:
        layout = plan.norm_array()
        there = np.ascontiguousarray(norms[:, layout.hooks.index(hook.name)])
        problem = difference(there, own_norms)
        if problem is not None:
            inspection.report(
                layout.key(index),
                f"has other norms of {hook.name} than its values: {problem}",
                run=plan.run,
                segment=index,
            )
    problem = agree(stored, statistics)
    if problem is None:
        return True
    inspection.report(
        commit_key(plan.run, index),
        f"has other statistics of {hook.name} than its values: {problem}",
        run=plan.run,
        segment=index,
    )
    return False

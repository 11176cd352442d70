"""Running a plan: claim the store, write the tokens, then compute the segments that are missing."""

import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from typing import Any, Final

from actstore.errors import IncompleteError, JobError, PlanMismatchError
from actstore.extraction.claim import claim
from actstore.extraction.computing import calling_thread
from actstore.extraction.computing.executor import Resources
from actstore.extraction.computing.executor import executor as find_executor
from actstore.extraction.computing.interruptible import interruptible
from actstore.extraction.computing.worker import WorkerSpec
from actstore.extraction.events import OnEvent, SegmentDone, ignore
from actstore.extraction.planning.devices import check_device
from actstore.extraction.planning.job import Job
from actstore.extraction.planning.job_model import absolute_model
from actstore.extraction.planning.planning import PlannedRun, check_memory, plan_job
from actstore.extraction.planning.planning import plan as make_plan
from actstore.extraction.report import Report
from actstore.store.locking.lease import Lease
from actstore.store.locking.turns import Turn, lease_tags, writing
from actstore.store.reading.rows import Rows, Section
from actstore.store.reading.segment_tokens import TokenReader
from actstore.store.records.commit import commit_key, read_commits, tokens_key
from actstore.store.records.manifest import RunStatistics
from actstore.store.records.run import read_runs
from actstore.store.records.seal import is_sealed, remove_scratch, seal
from actstore.store.statistics.not_finite import NotFinite, add_up, not_finite
from actstore.store.verifying.read_back import read_back

_PLACED_WITHIN: Final = 256
"""Number of segments whose records are searched for tokens that are not finite. All segments could take minutes."""


def extract(
    run: PlannedRun | Job | str | None = None,
    *,
    executor: str | None = None,
    num_workers: int | None = None,
    ray_address: str | None = None,
    device: str | None = None,
    on_event: OnEvent = ignore,
    **fields: Any,
) -> Report:
    """Compute and commit every segment that the store does not have yet.

    It may be killed at any point: the same call goes on from the segments that are committed. It returns after reading
    back from storage that the run is complete.

    Args:
        run: result of `actstore.plan`, or a job, or the path or URL of a job file; None if all fields are given as
            keywords.
        executor, num_workers, ray_address, device: fields of `Job`, which take precedence over those of the job.
        on_event: called with each event of progress.
        fields: other fields of a job, as `actstore.plan` takes them.

    Raises:
        BusyError: the store is being repaired; run again after that.
        IncompleteError: records were removed while this ran; run again.
        ActstoreError: anything else that is wrong, in one sentence. What is committed stays.
    """
    if not isinstance(run, PlannedRun):
        where = {
            "executor": executor,
            "num_workers": num_workers,
            "ray_address": ray_address,
            "device": device,
        }
        fields |= {name: value for name, value in where.items() if value is not None}
        run = make_plan(run, on_event=on_event, **fields)
    elif fields:
        raise JobError(
            f"{', '.join(fields)} cannot be given with a planned run, which has all that a job has; give it to plan"
        )
    job = run.job
    name = executor or job.executor
    if num_workers is not None and num_workers < 1:
        raise JobError(f"num_workers is {num_workers}; it must be 1 or more")
    if name == "inline" and (ray_address or (num_workers or 1) > 1):
        given = f"ray_address is {ray_address}" if ray_address else f"num_workers is {num_workers}"
        raise JobError(
            f"{given}, and executor inline is this one process; choose executor ray, or leave it out"
        )
    run.given.check_executor(name)
    resources = Resources(num_workers or job.num_workers, ray_address or job.ray_address)
    if run.given.model is not None:
        run.given.model.check_device(device)
    device = check_device(device or job.device, name, resources)
    check_memory(run, name, resources)
    report = _Extraction(run, name, resources, device, on_event).run()
    n_retries_before = run.blobs.n_retries
    following = _following(run)
    report = replace(report, n_retries=report.n_retries + run.blobs.n_retries - n_retries_before)
    if following is None:
        return report
    return report + extract(
        following,
        executor=executor,
        num_workers=num_workers,
        ray_address=ray_address,
        device=device,
        on_event=on_event,
    )


class _Extraction:
    """The extraction of one run of a store."""

    def __init__(
        self, run: PlannedRun, executor: str, resources: Resources, device: str | None, on_event: OnEvent
    ) -> None:
        self._planned = run
        self._execute = find_executor(executor)
        self._resources = resources
        self._device = device
        self._on_event = on_event
        self._done: dict[int, SegmentDone] = {}
        self._first_started = math.inf
        self._last_committed = -math.inf

    def run(self) -> Report:
        """Compute and write what is missing, and read back that the run is complete.

        Raises:
            ActstoreError: see `extract`.
        """
        started = time.perf_counter()
        blobs = self._planned.blobs
        n_retries_before = blobs.n_retries
        leases = lease_tags(blobs)
        if self._planned.is_finished and is_sealed(blobs):
            run = self._planned
            # Records were all read before the store was sealed; `actstore verify` reads them again.
            statistics = read_back(blobs, run.plan, are_records_read=True)
        else:
            with writing(blobs) as held:
                run = _reread(self._planned)
                self._write(run, held)
                read = seal(blobs)
                statistics = read_back(blobs, run.plan, are_records_read=run.plan.run in read)
        ended = time.perf_counter()
        remove_scratch(blobs, leases, ended - started)
        done = self._done.values()
        return Report(
            url=blobs.url,
            run=run.plan.run,
            n_segments=run.plan.n_segments,
            n_segments_before=len(run.committed),
            n_tokens=run.plan.n_tokens,
            n_tokens_computed=sum(segment.n_tokens for segment in done),
            n_rows=run.plan.n_stored_rows,
            nbytes_written=sum(segment.nbytes for segment in done),
            seconds=ended - started,
            seconds_tokenising=0.0 if run.packed is None else run.packed.seconds,
            seconds_forward=sum(segment.seconds_forward for segment in done),
            seconds_waiting=sum(segment.seconds_waiting for segment in done),
            n_retries=blobs.n_retries - n_retries_before + sum(segment.n_retries for segment in done),
            seconds_running=max(0.0, self._last_committed - self._first_started),
            n_truncated=run.plan.n_truncated,
            n_tokens_cut=run.plan.n_tokens_cut,
            not_finite=self._not_finite(run, statistics),
        )

    def _not_finite(self, run: PlannedRun, statistics: RunStatistics) -> dict[str, NotFinite]:
        """Tokens of the run that are not finite, by hook: their number from the records, their first sequences from the
        workers that computed them now, or from stored values.
        """
        now: dict[str, NotFinite] = reduce(
            add_up, (segment.not_finite for segment in self._done.values()), {}
        )
        by_hook = {}
        for name in run.plan.hook_names:
            record = statistics.hooks.get(name)
            counted = now.get(name, NotFinite(0, ()))
            n_tokens = counted.n_tokens if record is None else record.n_not_finite
            if n_tokens:
                by_hook[name] = NotFinite(n_tokens, counted.first_sequences)
        # Such tokens in segments of earlier calls are known only for hooks with statistics.
        unplaced = {name for name, counted in by_hook.items() if not counted.first_sequences}
        for name, sequences in _first_not_finite(run, unplaced).items():
            by_hook[name] = NotFinite(by_hook[name].n_tokens, sequences)
        return _numbered_through(run, by_hook)

    def _write(self, run: PlannedRun, held: Lease) -> None:
        """Write the tokens and segments that are missing of a run."""
        blobs, plan, job = run.blobs, run.plan, run.job
        if not run.is_finished:
            claim(blobs, plan)
        if run.packed is not None:
            run.packed.store(blobs, plan)
        if not run.pending:
            return

        def on_segment(segment: SegmentDone) -> None:
            now = time.perf_counter()
            begun = now - segment.seconds_forward - segment.seconds_writing
            self._first_started = min(self._first_started, begun)
            if segment.record is not None:
                held.check()
                blobs.create(commit_key(plan.run, segment.segment), [segment.record.to_bytes()])
                now = time.perf_counter()
            self._last_committed = now
            self._done[segment.segment] = replace(segment, record=None)
            self._on_event(self._done[segment.segment])

        live = run.given.model
        spec = WorkerSpec(
            blobs.url,
            absolute_model(job.model),
            job.revision,
            self._device if live is None else live.device,
            run=plan.run,
            is_strict=job.strict,
            is_conditional=run.is_conditional,
            turn=Turn.of(held),
            live=None if live is None else live.hooked,
            is_live_checked=run.given.is_model_checked,
        )
        if not calling_thread.is_plain_here():
            with ThreadPoolExecutor(1, thread_name_prefix="plain") as thread:
                interruptible(thread, lambda: self._execute(spec, run.pending, self._resources, on_segment))
        elif live is not None:
            calling_thread.run(spec, run.pending, on_segment)
        else:
            self._execute(spec, run.pending, self._resources, on_segment)


def _numbered_through(run: PlannedRun, by_hook: dict[str, NotFinite]) -> dict[str, NotFinite]:
    """The same tokens with their sequences numbered through the store, which counts those of earlier runs first."""
    runs = read_runs(run.blobs) if by_hook else ()
    before = sum(
        other.plan.n_sequences
        for other in runs
        if other.plan.has_own_tokens and other.plan.run < run.plan.tokens_of
    )
    return {
        name: NotFinite(tokens.n_tokens, tuple(before + sequence for sequence in tokens.first_sequences))
        for name, tokens in by_hook.items()
    }


def _first_not_finite(run: PlannedRun, hooks: set[str]) -> dict[str, tuple[int, ...]]:
    """First sequences with tokens that are not finite, by hook. They are those of the first stored segment with any, if
    it is among the first `_PLACED_WITHIN` segments.
    """
    sequences: dict[str, tuple[int, ...]] = {}
    segments = range(min(run.plan.n_segments, _PLACED_WITHIN))
    if not hooks:
        return sequences
    with contextlib.closing(read_commits(run.blobs, run.plan, segments)) as records:
        for record in records:
            for name in sorted(hooks - sequences.keys()):
                if record.statistics[name].n_not_finite:
                    sequences[name] = _not_finite_of(run, name, record.segment).first_sequences
            if len(sequences) == len(hooks):
                break
    return sequences


def _not_finite_of(run: PlannedRun, hook: str, index: int) -> NotFinite:
    """Tokens of one stored segment of a hook that are not finite."""
    blobs, plan = run.blobs, run.plan
    segment = plan.segment(index)
    array = next(array for array in plan.request.hooks if array.name == hook)
    rows = Rows(blobs, [Section(plan.activations(array), lambda _: True)])[segment.start : segment.stop]
    return not_finite(
        hook,
        rows,
        plan.request.dtype,
        TokenReader(blobs, plan)(segment).counts,
        first_sequence=segment.start,
        batch_size=plan.request.batch_size,
    )


def _reread(run: PlannedRun) -> PlannedRun:
    """A run with the segments that are committed now, since a repair may have removed some after it was planned.

    Raises:
        IncompleteError: more is gone than can be made again without planning.
    """
    if run.is_new:
        return run
    blobs, plan = run.blobs, run.plan
    stored = next((other for other in read_runs(blobs) if other.plan.run == plan.run), None)
    has_tokens = run.packed is not None or blobs.head(tokens_key(plan.tokens_of)) is not None
    if stored is None or not has_tokens or (run.is_finished and stored.finished is None):
        raise IncompleteError(
            f"run {plan.run} of {blobs.url} was changed after it had been planned, by a repair or another run; run "
            "the same command again"
        )
    return replace(run, committed=frozenset(stored.committed))


def _following(run: PlannedRun) -> PlannedRun | None:
    """The next incomplete run of the store that the job asks for, or None; a repair can leave several."""
    if all(other.finished is not None for other in read_runs(run.blobs)):
        return None
    try:
        following = plan_job(run.job, run.given)
    except PlanMismatchError:
        return None
    is_other = following.plan.run != run.plan.run
    return following if is_other and not following.is_finished else None

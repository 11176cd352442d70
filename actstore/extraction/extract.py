"""Running a plan: claim the store, write the tokens, then the segments that are missing."""

import time
from dataclasses import replace

from actstore.errors import JobError, PlanMismatchError
from actstore.extraction.claim import claim
from actstore.extraction.events import OnEvent, SegmentDone, ignore
from actstore.extraction.executor import Resources
from actstore.extraction.executor import executor as find_executor
from actstore.extraction.job import Job
from actstore.extraction.planning import PlannedRun, absolute_model, check_device
from actstore.extraction.planning import plan as make_plan
from actstore.extraction.report import Report
from actstore.extraction.worker import WorkerSpec
from actstore.store.commit import commit_key
from actstore.store.run import read_runs
from actstore.store.seal import remove_scratch, seal


def extract(
    run: PlannedRun | Job | str,
    *,
    executor: str | None = None,
    num_workers: int | None = None,
    ray_address: str | None = None,
    device: str | None = None,
    on_event: OnEvent = ignore,
) -> Report:
    """Compute and commit every segment that the store does not have yet.

    Kill it at any point: the same call goes on from the segments that are committed.

    Args:
        run: what `actstore.plan` gave, or a job, or the path or URL of a job file.
        executor: ``inline`` or ``ray``; this and the next three take precedence over the job's.
        num_workers: workers of the ray executor.
        ray_address: Ray cluster to join; None starts one on this machine.
        device: device of a worker.
        on_event: called with progress.

    Raises:
        ActstoreError: in one sentence what is wrong. What is committed stays.
    """
    if not isinstance(run, PlannedRun):
        run = make_plan(run, on_event=on_event)
    job = run.job
    started = time.perf_counter()
    execute = find_executor(executor or job.executor)
    device = check_device(device or job.device, executor or job.executor)
    if num_workers is not None and num_workers < 1:
        raise JobError(f"num_workers is {num_workers}; it must be 1 or more")
    pending = run.pending
    blobs, plan = run.blobs, run.plan
    n_retries_before = blobs.n_retries
    if not run.is_finished:
        claim(blobs, plan)
    if run.packed is not None:
        run.packed.store(blobs, plan)
    done: list[SegmentDone] = []
    first_started: list[float] = []

    def on_segment(segment: SegmentDone) -> None:
        now = time.perf_counter()
        first_started.append(now - segment.seconds_forward - segment.seconds_writing)
        if segment.record is not None:
            blobs.create(commit_key(plan.run, segment.segment), [segment.record.to_bytes()])
        done.append(replace(segment, record=None))
        on_event(done[-1])

    if pending:
        spec = WorkerSpec(
            blobs.url,
            absolute_model(job.model),
            job.revision,
            device,
            run=plan.run,
            is_strict=job.strict,
            is_conditional=run.is_conditional,
        )
        resources = Resources(num_workers or job.num_workers, ray_address or job.ray_address)
        execute(spec, pending, resources, on_segment)
    seal(blobs)
    remove_scratch(blobs)
    ended = time.perf_counter()
    report = Report(
        url=blobs.url,
        run=plan.run,
        n_segments=plan.n_segments,
        n_segments_before=len(run.committed),
        n_tokens=plan.n_tokens,
        n_tokens_computed=sum(segment.n_sequences for segment in done if segment.is_new)
        * plan.context_length,
        nbytes_written=sum(segment.nbytes for segment in done),
        seconds=ended - started,
        seconds_tokenising=0.0 if run.packed is None else run.packed.seconds,
        seconds_forward=sum(segment.seconds_forward for segment in done),
        seconds_waiting=sum(segment.seconds_waiting for segment in done),
        n_retries=blobs.n_retries - n_retries_before + sum(segment.n_retries for segment in done),
        seconds_running=ended - min(first_started, default=ended),
    )
    following = _following(run)
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


def _following(run: PlannedRun) -> PlannedRun | None:
    """A further run of the store that the job asks for and that is not complete: a repair can leave several."""
    if all(found.finished is not None for found in read_runs(run.blobs)):
        return None
    try:
        following = make_plan(run.job)
    except PlanMismatchError:
        return None
    return following if following.pending and following.plan.run != run.plan.run else None

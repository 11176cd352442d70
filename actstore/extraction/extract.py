"""Running a plan: claim the store, write the tokens, then the segments that are missing."""

import time

from actstore.errors import JobError, PlanMismatchError, StorageError
from actstore.extraction.events import OnEvent, SegmentDone, ignore
from actstore.extraction.executor import Resources
from actstore.extraction.executor import executor as find_executor
from actstore.extraction.job import Job
from actstore.extraction.planning import PlannedRun, absolute_model, check_device, is_same
from actstore.extraction.planning import plan as make_plan
from actstore.extraction.report import Report
from actstore.extraction.worker import WorkerSpec
from actstore.store.commit import PLAN_KEY, read_plan
from actstore.store.document import FORMAT
from actstore.store.layout import ROOT_METADATA, group_metadata, to_json


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
    if run.packed is not None:
        _claim(run)
        run.packed.store(run.blobs, run.plan)
    done: list[SegmentDone] = []
    first_started: list[float] = []

    def on_segment(segment: SegmentDone) -> None:
        now = time.perf_counter()
        first_started.append(now - segment.seconds_forward - segment.seconds_writing)
        done.append(segment)
        on_event(segment)

    if pending:
        spec = WorkerSpec(run.blobs.url, absolute_model(job.model), job.revision, device)
        resources = Resources(num_workers or job.num_workers, ray_address or job.ray_address)
        execute(spec, pending, resources, on_segment)
    ended = time.perf_counter()
    return Report(
        url=run.blobs.url,
        n_segments=run.plan.n_segments,
        n_segments_before=len(run.committed),
        n_tokens=run.plan.n_tokens,
        n_tokens_computed=sum(segment.n_sequences for segment in done if segment.is_new)
        * run.plan.context_length,
        nbytes_written=sum(segment.nbytes for segment in done),
        seconds=ended - started,
        seconds_tokenising=0.0 if run.packed is None else run.packed.seconds,
        seconds_forward=sum(segment.seconds_forward for segment in done),
        seconds_waiting=sum(segment.seconds_waiting for segment in done),
        seconds_running=ended - min(first_started, default=ended),
    )


def _claim(run: PlannedRun) -> None:
    """Write the plan first: whoever comes with another one is refused from here on. Then the Zarr metadata.

    Raises:
        PlanMismatchError: another run has claimed the place since this one was planned.
        StorageError: another Zarr hierarchy is there.
    """
    blobs, plan = run.blobs, run.plan
    blobs.create(PLAN_KEY, [plan.to_bytes()])
    claimed = read_plan(blobs)
    if claimed is None or not is_same(claimed, plan):
        raise PlanMismatchError(
            f"another run has just started a different plan at {blobs.url}; choose another out"
        )
    layouts = (*plan.token_arrays(), *(plan.activations(hook) for hook in plan.request.hooks))
    metadata = {layout.metadata_key: layout.metadata() for layout in layouts}
    metadata |= {f"{group}/zarr.json": group_metadata({}) for group in ("acts", "_actstore")}
    summary = {"format": FORMAT, "plan": PLAN_KEY, "hooks": list(plan.hook_names)}
    metadata[ROOT_METADATA] = group_metadata({"actstore": summary})
    for key, document in metadata.items():
        data = to_json(document)
        if not blobs.create(key, [data]) and bytes(blobs.read(key)) != data:
            raise StorageError(
                f"{blobs.url}/{key} is not what this plan would write; something else is at this place: choose "
                "another out"
            )

"""Running a job: claim the folder, compute the parts that are missing, then sum them up."""

import math
import time
from dataclasses import replace
from typing import Any

from actstore.errors import JobError
from actstore.extraction.computing.executor import Resources
from actstore.extraction.computing.executor import executor as find_executor
from actstore.extraction.planning.devices import check_device
from actstore.extraction.planning.job_model import absolute_model
from actstore.patching.jobs.events import OnEvent, PartDone, ignore
from actstore.patching.jobs.job import PatchJob, job_of
from actstore.patching.jobs.plan import JOB, PAIRS, PatchPlan, part_key
from actstore.patching.jobs.planning import PlannedPatching, going_on, plan_job, writable
from actstore.patching.jobs.report import REPORT, PatchReport
from actstore.patching.jobs.summary import files_of, summed_up
from actstore.patching.jobs.worker import PatchSpec
from actstore.storage.blobs import Blobs


def run_job(
    job: PlannedPatching | PatchJob | str | None = None, *, on_event: OnEvent = ignore, **fields: Any
) -> PatchReport:
    """Compute every part that is not there yet, and then the means over pairs.

    It may be killed at any point: the same call goes on from the parts that are there, and ends in the same bytes.

    Args:
        job: result of `plan_job`, or a job, or the path or URL of a job file; None if all fields are keywords.
        on_event: called with each part.
        fields: fields of a job, which take precedence over those of the file; with the result of `plan_job` only
            ``executor``, ``num_workers``, ``ray_address`` and ``device``.

    Raises:
        ActstoreError: something is wrong, in one sentence. What is computed stays.
    """
    planned = _with_resources(job, fields) if isinstance(job, PlannedPatching) else plan_job(job, **fields)
    started = time.perf_counter()
    blobs = writable(planned.blobs)
    planned = _claimed(blobs, planned)
    if REPORT in blobs.names(""):
        return PatchReport.from_bytes(bytes(blobs.read(REPORT)), f"{blobs.url}/{REPORT}")
    if blobs.head(PAIRS) is None:
        blobs.create(PAIRS, [planned.pairs.to_parquet()])
    rate = _computed(blobs, planned, on_event)
    return _finished(blobs, planned, rate, started)


def _with_resources(planned: PlannedPatching, fields: dict[str, Any]) -> PlannedPatching:
    wrong = sorted(fields.keys() - {"executor", "num_workers", "ray_address", "device"})
    if wrong:
        raise JobError(f"{wrong[0]} was given for a job that is planned already; give it to plan_job")
    return replace(planned, job=job_of(planned.job, fields))


def _claimed(blobs: Blobs, planned: PlannedPatching) -> PlannedPatching:
    """The job as its folder has it, after writing the plan, so that any other job is refused from here on.

    Raises:
        PlanMismatchError: another job was first.
    """
    if PatchPlan.read_if_there(blobs, JOB) is None and blobs.create(JOB, [planned.plan.to_bytes()]):
        return planned
    # Another process may have begun or gone on since this job was planned.
    return going_on(planned, PatchPlan.read(blobs, JOB))


def _computed(blobs: Blobs, planned: PlannedPatching, on_event: OnEvent) -> float:
    """Compute and store the parts that are missing; returns pairs per second."""
    if not planned.pending:
        return 0.0
    job = planned.job
    resources = Resources(job.num_workers, job.ray_address)
    device = check_device(job.device, job.executor, resources)
    first_started = math.inf
    n_pairs = 0

    def on_part(part: PartDone) -> None:
        nonlocal first_started, n_pairs
        first_started = min(first_started, time.perf_counter() - part.seconds)
        n_pairs += part.n_pairs
        # Another process may have been first, with the same bytes.
        blobs.create(part_key(part.part), [part.data])
        on_event(replace(part, data=b""))

    spec = PatchSpec(
        planned.plan, planned.pairs, absolute_model(job.model), job.revision, device, planned.plan.threads
    )
    find_executor(job.executor)(spec, planned.pending, resources, on_part)
    return n_pairs / max(time.perf_counter() - first_started, 1e-9)


def _finished(blobs: Blobs, planned: PlannedPatching, rate: float, started: float) -> PatchReport:
    """Write the means, and last the report."""
    plan = planned.plan
    summary = summed_up(replace(planned, blobs=blobs))
    for name, (result, _) in summary.means.items():
        for suffix, data in files_of(result):
            blobs.create(f"{name}{suffix}", [data])
    report = PatchReport(
        url=blobs.url,
        metric=plan.metric,
        n_pairs=plan.n_pairs,
        n_parts=plan.n_parts,
        n_parts_before=len(planned.done),
        n_cells=planned.n_cells,
        n_skipped=summary.figures.n_skipped,
        clean=summary.clean,
        corrupted=summary.corrupted,
        engines=dict(summary.figures.engines),
        noise_floor=summary.figures.noise_floor,
        summaries={name: n for name, (_, n) in summary.means.items()},
        seconds=time.perf_counter() - started,
        pairs_per_second=rate,
    )
    if not blobs.create(REPORT, [report.to_bytes()]):
        return PatchReport.from_bytes(bytes(blobs.read(REPORT)), f"{blobs.url}/{REPORT}")
    return report

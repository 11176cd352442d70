"""Planning: checking and counting everything before anything is computed or stored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actstore.counted import counted
from actstore.errors import JobError, PlanMismatchError, StorageError
from actstore.extraction.computing.executor import Resources, workers_here
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT
from actstore.extraction.events import OnEvent, ignore
from actstore.extraction.planning.devices import check_device
from actstore.extraction.planning.given import Given, taken
from actstore.extraction.planning.growth import Place, find_place, following_name
from actstore.extraction.planning.job import Job, load_job, parse_job
from actstore.extraction.planning.job_model import JobModel
from actstore.extraction.planning.tokenising.kept_tables import check_beside
from actstore.extraction.planning.tokenising.packed_tokens import PackedTokens
from actstore.extraction.planning.tokenising.tokens_stage import TokenStage
from actstore.extraction.planning.work_sizes import chosen_batch_size, chosen_segment_size
from actstore.memory import total_nbytes
from actstore.storage.blobs import Blobs
from actstore.storage.look_first import LookFirst
from actstore.storage.opening import open_blobs
from actstore.storage.probing import probe
from actstore.store.format.plan import (
    FIRST_RUN,
    MAX_CONTEXT,
    RUNS,
    HookArray,
    Plan,
    Request,
)
from actstore.store.locking.turns import refuse_beside_living_repair
from actstore.store.records.commit import read_plan
from actstore.store.records.run import read_runs
from actstore.store.statistics.moments import has_statistics
from actstore.tokens import MemorySource

_MAX_COVARIANCE_NBYTES = 256 << 20


@dataclass(frozen=True, repr=False)
class PlannedRun:
    """A job that was checked against model, text and storage, and is ready to run; the result of `actstore.plan`.

    Print it to see what it would write.
    """

    job: Job
    plan: Plan
    blobs: Blobs
    packed: PackedTokens | None
    """The packed tokens; None if they are in the store already."""
    committed: frozenset[int]
    """Segments that are committed already."""
    is_new: bool
    """Whether the store does not have this run yet."""
    is_finished: bool = False
    """Whether the run is in the manifest, so that there is nothing to do."""
    is_conditional: bool = True
    """Whether storage refuses to create a key twice; if not, only this process commits."""
    given: Given = field(default_factory=Given)
    """Objects in memory that fields of the job stand for."""

    def __repr__(self) -> str:
        return f"<PlannedRun {self.blobs.url}: {len(self.pending)} of {counted(self.plan.n_segments, 'segment')} to do>"

    @property
    def pending(self) -> tuple[int, ...]:
        """Segments still to be computed."""
        return tuple(index for index in range(self.plan.n_segments) if index not in self.committed)

    @property
    def nbytes_to_write(self) -> int:
        layouts = self.plan.segment_arrays()
        tokens = sum(layout.nbytes for layout in self.plan.token_arrays()) if self.packed else 0
        if self.packed is not None and self.packed.kept is not None:
            tokens += self.packed.kept.nbytes
        return tokens + sum(layout.max_shard_nbytes(index) for layout in layouts for index in self.pending)

    @property
    def worker_nbytes(self) -> int:
        """Memory that a worker holds for activations on their way to storage."""
        layouts = [self.plan.activations(hook) for hook in self.plan.request.hooks]
        segments = [layout.shard_rows * layout.row_nbytes for layout in layouts]
        # One more array of a segment while it is brought from the order of its batches into that of the store.
        sorting = max(segments) if self.plan.request.batching else 0
        return sum(segments) * min(SEGMENTS_IN_FLIGHT, self.plan.n_segments) + sorting

    def to_dict(self) -> dict[str, Any]:
        """The summary that is printed, as plain data."""
        plan = self.plan
        return {
            "out": self.blobs.url,
            "run": plan.run,
            "adds": None if plan.run == FIRST_RUN else "tokens" if plan.has_own_tokens else "hooks",
            "model": plan.request.model.name,
            "dtype": plan.request.dtype,
            "hooks": list(plan.hook_names),
            "n_sequences": plan.n_sequences,
            "context_length": plan.context_length,
            "n_tokens": plan.n_tokens,
            "positions": plan.request.tokens.positions or "all",
            "n_slots": plan.n_slots,
            "n_rows": plan.n_stored_rows,
            "n_truncated": plan.n_truncated,
            "n_tokens_cut": plan.n_tokens_cut,
            "nbytes": plan.nbytes,
            "n_objects": plan.n_objects,
            "n_segments": plan.n_segments,
            "n_segments_committed": len(self.committed),
            "segment_size": plan.segment_size,
            "batch_size": plan.request.batch_size,
            "nbytes_to_write": self.nbytes_to_write,
            "worker_nbytes": self.worker_nbytes,
        }

    def __str__(self) -> str:
        from actstore.extraction.report import cut, table

        plan = self.plan
        done = f"{len(self.committed)} of {counted(plan.n_segments, 'segment')} committed"
        state = ("new" if plan.run == FIRST_RUN else f"new run {plan.run}") if self.is_new else done
        hooks = plan.hook_names
        return table(
            {
                "store": f"{self.blobs.url} ({state})",
                "model": f"{plan.request.model.name}, {plan.request.dtype}",
                "hooks": f"{len(hooks)}: {hooks[0]}"
                + (f"{', ' if len(hooks) == 2 else ' ... '}{hooks[-1]}" if len(hooks) > 1 else ""),
                "tokens": f"{plan.n_tokens:,} in {counted(plan.n_sequences, 'sequence')} of {plan.context_length}",
                **self._position_rows(),
                **({"cut": cut(plan.n_truncated, plan.n_tokens_cut)} if plan.n_truncated else {}),
                "size": f"{plan.nbytes / 1e6:,.1f} MB in {counted(plan.n_objects, 'object')}",
                "segments": f"{plan.n_segments:,} of {counted(plan.segment_size, 'sequence')}, batches of "
                f"{plan.request.batch_size}",
                "memory": f"{self.worker_nbytes / 1e6:,.1f} MB in each worker, besides the model",
            }
        )

    def _position_rows(self) -> dict[str, str]:
        """The line about chosen positions; none if all are stored."""
        plan = self.plan
        if plan.n_slots is None:
            return {}
        line = f"{plan.request.tokens.positions}: {counted(plan.n_stored_rows, 'row')} of each hook"
        positions = None if self.packed is None else self.packed.spool.positions
        n_without = 0 if positions is None else int(np.count_nonzero(positions[:, 0] < 0))
        return {"positions": line + (f"; none of {counted(n_without, 'sequence')}" if n_without else "")}


def plan(job: Job | str | None = None, *, on_event: OnEvent = ignore, **fields: Any) -> PlannedRun:
    """Check a job against model, text and storage, and count what it will write.

    Nothing is written to the store yet; the text is read and tokenised to a temporary folder, unless the
    store has its tokens already.

    Args:
        job: a job, or the path or URL of a YAML file; None if all fields are given as keywords.
        on_event: called with each event of progress.
        fields: fields of a job, which take precedence over those of the file. In their place it takes objects:
            ``tokens`` can be prompts in memory (see `actstore.tokens.memory.opening.open_memory`), each of which gets a
            sequence of its own; ``model`` a `HookedModel` or a model of transformers, for the inline executor;
            ``tokenizer`` a tokenizer; ``dtype`` one of torch; ``hooks`` can have pairs such as ``("resid_post", 5)``.

    Raises:
        JobError, ModelError, HookError, TokensError, StorageError: something is wrong; the message says what.
        BusyError: the store at ``out`` is being repaired.
        PlanMismatchError: the store at ``out`` is of another plan; the differences are named.
    """
    return plan_job(*_parsed(job, fields), on_event)


def plan_job(job: Job, given: Given, on_event: OnEvent = ignore) -> PlannedRun:
    """`plan` for a job whose fields are parsed, with the objects in memory that some of them stand for."""
    open_blobs(job.out)  # refuses a wrong URL before anything is loaded
    resources = Resources(job.num_workers, job.ray_address)
    given.check_executor(job.executor)
    if given.model is not None:
        given.model.check_device(job.device)
    check_device(job.device, job.executor, resources)
    model = JobModel(job, given.model)
    stage = None
    if job.context_length == "auto":
        model.hooks(1)  # what is wrong with them is said before all text is read
        stage = _fitted(job, model, given)
        job = job.model_copy(update={"context_length": stage.packing.context_length})
    length = job.context_length
    assert isinstance(length, int)
    model.check_context(length)
    hooks = model.hooks(length)
    _check_covariance(job, hooks)
    if stage is None:
        stage = _stage(job, model, given, length)
    blobs = open_blobs(job.out)
    refuse_beside_living_repair(blobs)
    runs = read_runs(blobs)
    request = Request(
        model=model.identity(),
        tokens=stage.identity,
        hooks=hooks,
        dtype=model.dtype,
        batch_size=chosen_batch_size(job, length, given, runs),
        compression=job.compression,
        covariance=job.covariance,
        # Packed text fills its sequences.
        batching="length" if stage.identity.packing == "document" else None,
    )
    if any(run.plan.request.model.is_imported for run in runs):
        raise PlanMismatchError(
            f"the activations at {blobs.url} were imported, and no model's can be put beside them; choose another out, "
            "or import the same folder again to complete them"
        )
    place = find_place(
        blobs.url,
        runs,
        request,
        segment_size=job.segment_size,
        append=job.append,
        prompts=stage.source if isinstance(stage.source, MemorySource) else None,
    )
    run = _plan_run(job, request, blobs, place, stage, on_event)
    if run.packed is not None and run.packed.kept is not None:
        check_beside(blobs, runs, run.plan, run.packed.kept)
    _check_space(run)
    check_memory(run, job.executor, resources)
    return replace(run, given=given)


def _stage(job: Job, model: JobModel, given: Given, context_length: int) -> TokenStage:
    return TokenStage.of(job, model.n_embeddings, given, context_length=context_length, bos=model.bos)


def _fitted(job: Job, model: JobModel, given: Given) -> TokenStage:
    """The token stage with rows as long as the longest document; prompts that the store has already are not measured
    again.
    """
    limit = model.n_positions or MAX_CONTEXT
    stage = _stage(job, model, given, limit)
    runs = read_runs(open_blobs(job.out))
    for run in runs:
        tokens = run.plan.request.tokens
        is_whole = run.plan.n_truncated == 0 or tokens.context_length == limit
        if given.tokens is not None and tokens.files == stage.identity.files and is_whole:
            return stage.of_length(tokens.context_length)
    at_least = runs[0].plan.context_length if runs else 1
    return stage.fitted(job.model, at_least)


def _plan_run(
    job: Job, request: Request, blobs: Blobs, place: Place, stage: TokenStage, on_event: OnEvent
) -> PlannedRun:
    existing = place.run
    if existing is not None and existing.finished is not None:
        return PlannedRun(
            job, existing.plan, blobs, None, frozenset(existing.committed), is_new=False, is_finished=True
        )
    is_conditional = probe(blobs)
    blobs = blobs if is_conditional else LookFirst(blobs)
    if job.strict and not is_conditional:
        raise JobError(
            f"strict needs storage that refuses a second create of a key, and {blobs.url} does not; leave strict "
            "out, or choose another out"
        )
    if existing is not None and (existing.has_tokens or not existing.plan.has_own_tokens):
        done = frozenset(existing.committed)
        return PlannedRun(job, existing.plan, blobs, None, done, is_new=False, is_conditional=is_conditional)
    if existing is None:
        place = free_place(blobs, place)
    if place.over is not None:
        hooks = tuple(hook for hook in request.hooks if hook.name in place.hooks)
        added = request.model_copy(update={"hooks": hooks, "tokens": place.over.request.tokens})
        size = chosen_segment_size(job, added, place.over)
        norms = any(hook.has_norms for hook in hooks)
        changes = {"run": place.name, "request": added, "segment_size": size, "norms": norms}
        made = place.over.model_copy(update=changes)
        return PlannedRun(job, made, blobs, None, frozenset(), is_new=True, is_conditional=is_conditional)
    skip = sum(plan.n_sequences for plan in place.skipped)
    if existing is not None:
        skip = existing.plan.request.tokens.skip_sequences
    n_slots = place.n_slots if existing is None else existing.plan.n_slots
    packed = stage.run(on_event, skip_sequences=skip, skipped=place.skipped, n_slots=n_slots)
    tokens = request.tokens.model_copy(update={"skip_sequences": skip})
    request = request.model_copy(update={"tokens": tokens})
    made = Plan(
        run=place.name,
        tokens_of=place.name,
        request=request,
        n_sequences=packed.spool.n_sequences,
        n_tokens=packed.spool.n_tokens,
        n_documents=packed.spool.n_documents,
        tokens_sha256=packed.sha256(),
        segment_size=chosen_segment_size(job, request, packed.spool),
        n_slots=packed.spool.n_slots,
        n_rows=packed.spool.n_rows,
        n_truncated=packed.spool.n_truncated,
        n_tokens_cut=packed.spool.n_tokens_cut,
        norms=any(hook.has_norms for hook in request.hooks),
    )
    if existing is not None and (made.tokens_sha256, made.n_rows) != (
        existing.plan.tokens_sha256,
        existing.plan.n_rows,
    ):
        raise PlanMismatchError(
            f"the store at {blobs.url} was planned over other tokens than {job.tokens} gives now; the text has "
            "changed: choose another out, or delete that store"
        )
    plan = made if existing is None else existing.plan
    done = frozenset() if existing is None else frozenset(existing.committed)
    return PlannedRun(job, plan, blobs, packed, done, is_new=existing is None, is_conditional=is_conditional)


def _parsed(job: Job | str | None, fields: Mapping[str, Any]) -> tuple[Job, Given]:
    plain, given = taken(fields)
    defaults = {} if given.tokens is None else {"packing": "document"}
    if job is not None and not isinstance(job, Job):
        return load_job(str(job), plain, defaults), given  # a path can be a Path
    return parse_job(defaults | ({} if job is None else job.model_dump(exclude_unset=True)) | plain), given


def _check_covariance(job: Job, hooks: Sequence[HookArray]) -> None:
    sizes = [math.prod(hook.shape) for hook in hooks if has_statistics(hook)]
    # The upper triangle in float64, in base64.
    nbytes = sum(size * (size + 1) // 2 * 8 * 4 // 3 for size in sizes)
    if job.covariance and nbytes > _MAX_COVARIANCE_NBYTES:
        raise JobError(
            f"covariance of these hooks would be {nbytes / 1e6:,.0f} MB in every commit record, and "
            f"{_MAX_COVARIANCE_NBYTES / 1e6:,.0f} MB are the most; choose fewer or narrower hooks, "
            "or leave covariance out"
        )


def free_place(blobs: Blobs, place: Place) -> Place:
    """The place with the first run name that is free: records without a plan under a name are not ours.

    Raises:
        StorageError: the name of the first run is not free, and it cannot have another; or the place has shards of a
            store that was deleted in part, which must not be taken for ours.
    """
    while blobs.names(f"{RUNS}/{place.name}") and read_plan(blobs, place.name) is None:
        if place.name == FIRST_RUN:
            raise StorageError(
                f"{blobs.url}/{RUNS}/{FIRST_RUN} holds records and no plan, the rest of a store that was deleted in "
                "part; delete it whole, or choose another out"
            )
        place = replace(place, name=following_name(blobs.url, place.name))
    for path in place.arrays:
        if any(key.startswith("c.") for key in blobs.names(path)):
            raise StorageError(
                f"{blobs.url} has no plan for {path} but holds shards of it, the rest of a store that was deleted "
                "in part; delete it whole, or choose another out"
            )
    return place


def _check_space(run: PlannedRun) -> None:
    free = run.blobs.free_nbytes()
    needed = run.nbytes_to_write
    if free is not None and needed > free:
        raise StorageError(
            f"{run.blobs.url} would need {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; store "
            "fewer hooks or tokens, or choose another disk"
        )


def check_memory(run: PlannedRun, executor: str, resources: Resources) -> None:
    """Check that this machine has the memory for the activations of the workers that it would run.

    Raises:
        JobError: it has not; or there is no such executor.
    """
    n_workers = workers_here(executor, resources)
    memory = total_nbytes()
    if n_workers is None or run.worker_nbytes * n_workers <= memory:
        return
    who = "a worker" if n_workers == 1 else f"{n_workers} workers"
    raise JobError(
        f"{who} would hold {run.worker_nbytes * n_workers / 1e9:.1f} GB of activations in memory and this machine has "
        f"{memory / 1e9:.1f} GB; choose a smaller batch_size or segment_size, fewer hooks or workers, "
        "or the ray executor and the address of a cluster"
    )

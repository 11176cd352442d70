"""Planning: checking a job against model, pairs and storage before anything is computed."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from actstore.counted import counted
from actstore.errors import PlanMismatchError, StorageError
from actstore.extraction.computing.executor import Resources, workers_here
from actstore.extraction.fingerprint import fingerprint
from actstore.extraction.planning.devices import check_device
from actstore.extraction.planning.job_model import absolute_model
from actstore.extraction.report import table
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.families.model_names import hooks_of
from actstore.hooks.loading.pretrained import load_config, load_tokenizer
from actstore.hooks.text.prompts import Prompts
from actstore.patching.axes import leaf_of, sizes_of
from actstore.patching.jobs.job import PatchJob, job_of
from actstore.patching.jobs.pairs import Pairs
from actstore.patching.jobs.plan import JOB, PatchedModel, PatchPlan, differences, part_key
from actstore.patching.jobs.report import REPORT
from actstore.patching.jobs.source import read_pairs
from actstore.patching.jobs.tokenising import PairRules, tokenised
from actstore.storage.blobs import Blobs
from actstore.storage.look_first import LookFirst
from actstore.storage.opening import open_blobs
from actstore.storage.probing import probe


@dataclass(frozen=True, repr=False)
class PlannedPatching:
    """A job that was checked against model, pairs and storage; the result of `plan_job`. Print it to see its size."""

    job: PatchJob
    plan: PatchPlan
    pairs: Pairs
    cfg: HookedConfig
    blobs: Blobs
    done: frozenset[int]
    """Parts that are there already."""
    is_new: bool
    """Whether there is nothing of this job yet."""

    @property
    def pending(self) -> tuple[int, ...]:
        """Parts still to be computed."""
        return tuple(index for index in range(self.plan.n_parts) if index not in self.done)

    @property
    def n_pairs_pending(self) -> int:
        return sum(len(self.plan.part(index)) for index in self.pending)

    @cached_property
    def n_cells(self) -> int:
        """Cells of all pairs."""
        return sum(self.cells_of(length) for length in self.pairs.lengths.tolist())

    def cells_of(self, length: int) -> int:
        """Cells of the grid of a pair of so many tokens."""
        return prod(sizes_of(self.cfg, self.plan.hook, self.plan.axes, length))

    def to_dict(self) -> dict[str, Any]:
        """The summary that is printed, as plain data."""
        plan, lengths = self.plan, self.pairs.lengths
        return {
            "out": self.blobs.url,
            "model": plan.model.name,
            "dtype": plan.dtype,
            "hook": plan.hook,
            "axes": list(plan.axes),
            "metric": plan.metric,
            "positions": list(plan.positions),
            "n_pairs": plan.n_pairs,
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
            "n_cells": self.n_cells,
            "n_parts": plan.n_parts,
            "n_parts_done": len(self.done),
            "part_size": plan.part_size,
        }

    def __str__(self) -> str:
        plan, lengths = self.plan, self.pairs.lengths
        state = "new" if self.is_new else f"{len(self.done)} of {counted(plan.n_parts, 'part')} there"
        shortest, longest = lengths.min(), lengths.max()
        tokens = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        return table(
            {
                "results": f"{self.blobs.url} ({state})",
                "model": f"{plan.model.name}, {plan.dtype}",
                "pairs": f"{plan.n_pairs:,} of {tokens} tokens",
                "grid": f"{plan.hook} by {', '.join(plan.axes)}",
                "metric": f"{plan.metric} at {', '.join(map(str, plan.positions))}",
                "cells": f"{self.n_cells:,}, {self.n_cells / plan.n_pairs:,.0f} a pair",
                "parts": f"{plan.n_parts:,} of {counted(plan.part_size, 'pair')}",
            }
        )

    def __repr__(self) -> str:
        return f"<PlannedPatching {self.blobs.url}: {len(self.pending)} of {counted(self.plan.n_parts, 'part')} to do>"


def plan_job(job: PatchJob | str | None = None, **fields: Any) -> PlannedPatching:
    """Check a job against model, pairs and storage. Nothing is stored, and no weights are loaded.

    Args:
        job: a job, or the path or URL of a YAML file; None if all fields are given as keywords.
        fields: fields of a job, which take precedence over those of the file.

    Raises:
        JobError, ModelError, HookError, TokensError, StorageError: something is wrong; the message says what.
        PatchError: a pair cannot be patched, or the hook has no such axes.
        PlanMismatchError: the folder holds the results of another job; the differences are named.
    """
    job = job_of(job, fields)
    blobs = open_blobs(job.out)
    check_device(job.device, job.executor, Resources(job.num_workers, job.ray_address))
    config = load_config(job.model, revision=job.revision)
    names, cfg = hooks_of(config)
    leaf = leaf_of(names, job.hook)
    sizes_of(cfg, leaf, job.axis_names, 1)
    pairs = tokenised(read_pairs(job.pairs, job.limit), _rules(job, cfg))
    plan = PatchPlan(
        model=PatchedModel(
            name=absolute_model(job.model),
            revision=job.revision,
            fingerprint=fingerprint(job.model, job.revision),
            model_type=config.model_type,
        ),
        dtype=job.dtype,
        source=job.pairs,
        n_pairs=len(pairs),
        pairs_sha256=pairs.sha256(),
        hook=leaf,
        axes=job.axis_names,
        metric=job.metric,
        positions=job.measured_positions,
        max_tokens=job.max_tokens,
        part_size=job.part_size,
        threads=job.threads or _threads_of(job),
    )
    planned = PlannedPatching(job, plan, pairs, cfg, blobs, frozenset(), is_new=True)
    stored = PatchPlan.read_if_there(blobs, JOB)
    if stored is not None:
        return going_on(planned, stored)
    rest = [*blobs.names("parts"), *({REPORT} & set(blobs.names("")))]
    if rest:
        what = "its report" if rest == [REPORT] else "parts"
        raise StorageError(
            f"{blobs.url} holds {what} and no {JOB}, the rest of results that were deleted; choose another out"
        )
    return planned


def going_on(planned: PlannedPatching, stored: PatchPlan) -> PlannedPatching:
    """The same job with the plan that its folder holds, and the parts that are there.

    Raises:
        PlanMismatchError: the folder holds the results of another job.
    """
    blobs = planned.blobs
    # On another machine, the job goes on with the threads that it began with.
    same = {} if planned.job.threads else {"threads": stored.threads}
    check_same(blobs, stored, planned.plan.model_copy(update=same))
    there = set(blobs.names("parts"))
    done = frozenset(index for index in range(stored.n_parts) if part_key(index).rpartition("/")[2] in there)
    # The folder keeps the plan of its first call, however the same model and pairs are called now.
    return replace(planned, plan=stored, done=done, is_new=False)


def writable(blobs: Blobs) -> Blobs:
    """The same storage, after a trial whether it can be written.

    Raises:
        StorageError: it cannot.
    """
    return blobs if probe(blobs) else LookFirst(blobs)


def check_same(blobs: Blobs, stored: PatchPlan, asked: PatchPlan) -> None:
    """Check that a folder belongs to a job.

    Raises:
        PlanMismatchError: it holds the results of another one.
    """
    lines = differences(stored, asked)
    if lines:
        raise PlanMismatchError(
            f"{blobs.url} holds the results of another job: {'; '.join(lines)}; choose another out, or run the job it "
            "was made with"
        )


def _threads_of(job: PatchJob) -> int:
    """CPU threads that a worker would have on this machine."""
    import torch

    n_workers = workers_here(job.executor, Resources(job.num_workers, job.ray_address)) or 1
    return max(1, torch.get_num_threads() // n_workers)


def tokenizer_of(job: PatchJob) -> Prompts | str:
    """The tokenizer of the model of a job; or the reason why there is none."""
    tokenizer = load_tokenizer(job.model, job.revision)
    return tokenizer if isinstance(tokenizer, str) else Prompts(tokenizer, prepend_bos=job.prepend_bos)


def _rules(job: PatchJob, cfg: HookedConfig) -> PairRules:
    return PairRules(
        prompts=tokenizer_of(job),
        prepend_bos=job.prepend_bos,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        positions=job.measured_positions,
        has_wrong=job.metric == "logit_difference",
    )

"""A run of a store: its plan, and what is committed of it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError, StorageError
from actstore.storage.blobs import ATTEMPT, BlobInfo, Blobs
from actstore.store.format.plan import FIRST_RUN, RUNS, HookArray, Plan
from actstore.store.format.remembered import remembered
from actstore.store.records.commit import committed, plan_key, read_plan, tokens_key
from actstore.store.records.manifest import FinishedRun, Manifest, read_manifest_and_head
from actstore.store.records.segment_ranges import SegmentRanges


@dataclass(frozen=True, repr=False)
class Run:
    """A plan and its progress."""

    plan: Plan
    committed: Collection[int]
    """The numbers of the committed segments."""
    has_tokens: bool
    """Whether the token arrays of the run are committed; False for a run that adds hooks."""
    finished: FinishedRun | None
    """The entry of the run in the manifest."""
    plan_tag: str | None = None
    """The result of `plan_tag_of` when the plan was read, if the run is not in the manifest."""
    manifest_tag: str | None = dataclasses.field(default=None, compare=False)
    """The result of `tag_of` for the manifest that names the run, if storage returns that without another request."""

    def __repr__(self) -> str:
        plan = self.plan
        what = "tokens and hooks" if plan.has_own_tokens else f"hooks over run {plan.tokens_of}"
        return (
            f"<Run {plan.run}: {what}, {plan.hook_listing}, {len(self.committed)}/{plan.n_segments} segments>"
        )

    @property
    def is_complete(self) -> bool:
        return len(self.committed) == self.plan.n_segments

    def committed_rows(self) -> NDArray[np.bool_]:
        """Whether each sequence of the plan is committed, [n_sequences]."""
        rows = np.zeros(self.plan.n_sequences, dtype=bool)
        for index in self.committed:
            segment = self.plan.segment(index)
            rows[segment.start : segment.stop] = True
        return rows

    def committed_ranges(self) -> list[range]:
        """The committed sequences as ascending ranges, which take no memory per row."""
        if self.is_complete:
            return [range(self.plan.n_sequences)]
        if isinstance(self.committed, SegmentRanges):
            spans = (
                (self.plan.segment(span[0]), self.plan.segment(span[-1])) for span in self.committed.ranges
            )
            return [range(first.start, last.stop) for first, last in spans]
        segments = (self.plan.segment(index) for index in sorted(self.committed))
        return [range(segment.start, segment.stop) for segment in segments]

    def hook(self, name: str) -> HookArray | None:
        return next((hook for hook in self.plan.request.hooks if hook.name == name), None)


def runs_with_tokens(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs that brought tokens, in order: their sequences follow each other."""
    return tuple(run for run in runs if run.plan.has_own_tokens)


def runs_over(runs: Sequence[Run], part: Run) -> list[Run]:
    """The runs whose hooks are over the tokens that one of them brought, itself among them."""
    return [run for run in runs if run.plan.tokens_of == part.plan.run]


def run_names(blobs: Blobs) -> list[str]:
    """The names of all runs, from one listing. A folder without a plan is no run: its writer was killed before it
    began.
    """
    return list(_plan_tags(blobs))


def _plan_tags(blobs: Blobs) -> dict[str, str]:
    """The result of `plan_tag_of` for the plan of each run, by name."""
    names = [name for name in blobs.names(RUNS) if len(name) == 4 and name.isascii() and name.isdecimal()]
    plans = {name: blobs.head(plan_key(name)) for name in names}
    return {name: plan_tag_of(info) for name, info in plans.items() if info is not None}


def tag_of(info: BlobInfo) -> str:
    """A tag that differs for each blob ever written under a key, even with equal content, if storage allows."""
    return f"{info.tag} {info.metadata.get(ATTEMPT, '')}"


def plan_tag_of(info: BlobInfo) -> str:
    """A tag like `tag_of` that does not depend on the inode of a file. A plan is never replaced; if a store is deleted
    and written again, its plan has another time.
    """
    return info.lasting_tag or tag_of(info)


def read_runs(blobs: Blobs) -> tuple[Run, ...]:
    """All runs of the store at this URL, by name; empty if there is no store.

    A sealed store takes one small read; otherwise runs and commits are listed.

    Raises:
        StorageError: a plan or the manifest is damaged or cannot be read, or the store has lost its first plan.
    """
    manifest, info = read_manifest_and_head(blobs)
    tag = None if info is None else tag_of(info)
    known = {} if manifest is None else {entry.plan.run: entry for entry in manifest.runs}
    runs = {name: _finished(entry, tag) for name, entry in known.items()}
    if manifest is None or not manifest.sealed:
        for name, tag in _plan_tags(blobs).items():
            plan = read_plan(blobs, name) if name not in runs else None
            if plan is not None:
                has_tokens = plan.has_own_tokens and blobs.head(tokens_key(name)) is not None
                runs[name] = Run(plan, committed(blobs, plan), has_tokens, None, tag)
    if runs and FIRST_RUN not in runs:
        raise StorageError(
            f"{blobs.url} is damaged: {plan_key(FIRST_RUN)} is missing, and other runs are there"
        )
    problems = (
        _contradictions_in(manifest)
        if manifest is not None and len(runs) == len(known)
        else contradictions({name: run.plan for name, run in runs.items()})
    )
    for name, problem in problems.items():
        raise StorageError(f"{blobs.url} is damaged: run {name} {problem}")
    return tuple(runs[name] for name in sorted(runs))


@remembered
def _contradictions_in(manifest: Manifest) -> dict[str, str]:
    return contradictions({entry.plan.run: entry.plan for entry in manifest.runs})


def contradictions(plans: Mapping[str, Plan]) -> dict[str, str]:
    """The contradictions between the plans of a store: by run, a sentence about it without its subject."""
    problems: dict[str, str] = {}
    shapes: dict[str, HookArray] = {}
    stored: set[tuple[str, str]] = set()
    for name in sorted(plans):
        plan = plans[name]
        problem = _contradiction(plan, plans.get(plan.tokens_of), plans[min(plans)])
        for hook in plan.request.hooks:
            place = (plan.tokens_of, hook.name)
            if problem is None and place in stored:
                problem = f"has {hook.name}, which an earlier run has over the same tokens"
            if problem is None and shapes.setdefault(hook.name, hook) != hook:
                problem = f"has {hook.name} of another shape than an earlier run"
            stored.add(place)
        if problem is not None:
            problems[name] = problem
    return problems


def _contradiction(plan: Plan, over: Plan | None, first: Plan) -> str | None:
    if over is None:
        return f"is over the tokens of run {plan.tokens_of}, which is missing"
    if not over.has_own_tokens:
        return f"is over the tokens of run {over.run}, which brings none"
    for field in (
        "n_sequences",
        "n_tokens",
        "n_documents",
        "n_truncated",
        "n_tokens_cut",
        "tokens_sha256",
        "n_slots",
        "n_rows",
    ):
        if getattr(plan, field) != getattr(over, field):
            return f"has another {field} than run {over.run}, over whose tokens it is"
    alike = {
        "dtype": (plan.request.dtype, first.request.dtype),
        "model": (plan.request.model.fingerprint, first.request.model.fingerprint),
        "context_length": (plan.context_length, first.context_length),
        "n_slots": (plan.n_slots, first.n_slots),
        "positions": (plan.request.tokens.positions, first.request.tokens.positions),
    }
    for field, (here, there) in alike.items():
        if here != there:
            return f"has another {field} than run {first.run}: {here} and {there}"
    try:
        for hook in plan.request.hooks:
            plan.activations(hook)
    except JobError as error:
        return f"cannot be: {error}"
    return None


def overlap(left: Sequence[range], right: Sequence[range]) -> list[range]:
    """The intersection of two lists of ascending ranges, in the same form."""
    intersection = []
    i = j = 0
    while i < len(left) and j < len(right):
        common = range(max(left[i].start, right[j].start), min(left[i].stop, right[j].stop))
        if common:
            intersection.append(common)
        if left[i].stop < right[j].stop:
            i += 1
        else:
            j += 1
    return intersection


def _finished(entry: FinishedRun, tag: str | None) -> Run:
    plan = entry.plan
    return Run(plan, range(plan.n_segments), plan.has_own_tokens, entry, manifest_tag=tag)

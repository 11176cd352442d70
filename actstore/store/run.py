"""One run of a store: what it planned, and what of it is committed."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.store.blobs import Blobs
from actstore.store.commit import committed, plan_key, read_plan, tokens_key
from actstore.store.manifest import FinishedRun, read_manifest
from actstore.store.plan import FIRST_RUN, RUNS, HookArray, Plan


@dataclass(frozen=True)
class Run:
    """A plan, and how far it has come."""

    plan: Plan
    committed: Collection[int]
    """Numbers of the committed segments."""
    has_tokens: bool
    """Whether the token arrays that it brings are committed; False for a run that adds hooks."""
    finished: FinishedRun | None
    """Its entry in the manifest."""

    @property
    def is_complete(self) -> bool:
        return len(self.committed) == self.plan.n_segments

    def committed_rows(self) -> NDArray[np.bool_]:
        """[n_sequences] of the plan."""
        rows = np.zeros(self.plan.n_sequences, dtype=bool)
        for index in self.committed:
            segment = self.plan.segment(index)
            rows[segment.start : segment.stop] = True
        return rows

    def hook(self, name: str) -> HookArray | None:
        return next((hook for hook in self.plan.request.hooks if hook.name == name), None)


def run_names(blobs: Blobs) -> list[str]:
    """Names of all runs, from one listing. A folder without a plan is none: a writer was killed before it began."""
    names = [name for name in blobs.names(RUNS) if len(name) == 4 and name.isdecimal()]
    return [name for name in names if blobs.head(plan_key(name)) is not None]


def read_runs(blobs: Blobs) -> tuple[Run, ...]:
    """All runs below this URL, by name; none if there is no store.

    A sealed store takes one small read; otherwise runs and commits are listed.

    Raises:
        StorageError: a plan or the manifest is damaged or cannot be read; or the store has lost its first plan.
    """
    manifest = read_manifest(blobs)
    known = {} if manifest is None else {entry.plan.run: entry for entry in manifest.runs}
    runs = {name: _finished(entry) for name, entry in known.items()}
    if manifest is None or not manifest.sealed:
        for name in run_names(blobs):
            plan = read_plan(blobs, name) if name not in runs else None
            if plan is not None:
                has_tokens = plan.has_own_tokens and blobs.head(tokens_key(name)) is not None
                runs[name] = Run(plan, committed(blobs, plan), has_tokens, None)
    if runs and FIRST_RUN not in runs:
        raise StorageError(
            f"{blobs.url} is damaged: {plan_key(FIRST_RUN)} is missing, and other runs are there"
        )
    for run in runs.values():
        if run.plan.tokens_of not in runs:
            raise StorageError(
                f"{blobs.url} is damaged: run {run.plan.run} is over the tokens of run {run.plan.tokens_of}, which is "
                "missing"
            )
    return tuple(runs[name] for name in sorted(runs))


def _finished(entry: FinishedRun) -> Run:
    return Run(entry.plan, range(entry.plan.n_segments), entry.plan.has_own_tokens, entry)

"""Checking a store: every committed byte against every record that vouches for it."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs, check_key
from actstore.store.format.plan import FIRST_RUN, RUNS, Plan
from actstore.store.records.commit import commit_key, commits_folder, plan_key, tokens_key
from actstore.store.records.manifest import MANIFEST_KEY, FinishedRun, Manifest
from actstore.store.records.run import contradictions, run_names
from actstore.store.records.zarr_documents import zarr_documents
from actstore.store.verifying.findings import Finding
from actstore.store.verifying.inspection import Inspection, OnObject
from actstore.store.verifying.segment_check import check_segment
from actstore.store.verifying.summary_check import RecordSums, check_summary
from actstore.store.verifying.token_check import CheckedTokens, check_tokens

_READERS: Final = 4
_SEGMENTS_AT_ONCE: Final = 64
"""Number of segments whose records are in memory together."""
_MISSING_NAMED: Final = 1000
"""The most missing records that are reported one by one. A damaged plan can announce any number of them."""


class Check:
    """One pass over a store. Every problem becomes a `Finding`, and the pass goes on."""

    def __init__(self, blobs: Blobs, on_object: OnObject = lambda _nbytes: None) -> None:
        self._blobs = blobs
        self._inspection = Inspection(blobs, on_object)
        self.finished: dict[str, FinishedRun] = {}
        """The entries in the manifest, by run."""
        self.plans: dict[str, Plan] = {}
        """The plans that can be trusted, by run."""
        self.committed: dict[str, list[int]] = {}
        """The segments that have a record, damaged or not, by run."""
        self.vouched: dict[str, set[int]] = {}
        """The segments with a record that says what their shards are, by run."""
        self.tokens: dict[str, CheckedTokens | None] = {}
        """The checked tokens of each run with a tokens record; None if that is damaged."""

    @property
    def findings(self) -> list[Finding]:
        """The findings by run, then by segment; those of no segment come first."""
        return sorted(
            self._inspection.findings,
            key=lambda finding: (
                finding.run or "",
                -1 if finding.segment is None else finding.segment,
                finding.key,
            ),
        )

    @property
    def n_objects(self) -> int:
        """Number of objects that were read."""
        return self._inspection.n_objects

    @property
    def nbytes(self) -> int:
        """Bytes of the objects that were read."""
        return self._inspection.nbytes

    @property
    def is_complete(self) -> bool:
        """Whether everything that was planned is committed."""
        return bool(self.plans) and all(
            len(self.committed[name]) == plan.n_segments and (not plan.has_own_tokens or name in self.tokens)
            for name, plan in self.plans.items()
        )

    def run(self) -> None:
        """Check everything. A store that grows meanwhile is not damaged by that.

        Raises:
            StorageError: storage cannot be listed or reached.
        """
        # Records are read after the objects they vouch for were listed, so new objects do not seem to be superfluous,
        # and later ones do not seem to be missing.
        names, manifest = run_names(self._blobs), self._manifest()
        if _is_behind(manifest, names):
            # A run that began just now changes the manifest right after it has written its plan.
            names, manifest = run_names(self._blobs), self._manifest()
            if _is_behind(manifest, names):
                self._inspection.report(MANIFEST_KEY, "is sealed, and does not name all runs of the store")
        finished = {} if manifest is None else {entry.plan.run: entry for entry in manifest.runs}
        self.finished = finished
        self._runs_without_plan({*names, *finished})
        for name in sorted({*names, *finished}):
            plan = self._plan(name, finished.get(name))
            if plan is not None:
                self.plans[name] = plan
        self._drop_contradictions()
        for name, plan in self.plans.items():
            self.committed[name] = self._committed(plan, is_finished=name in finished)
        checked_keys: set[str] = set()
        for name, plan in self.plans.items():
            self._metadata(plan, checked_keys)
            if plan.has_own_tokens:
                self._tokens(plan, is_finished=name in finished)
            sums = self._segments(plan)
            if name in finished:
                check_summary(self._inspection, finished[name], sums)

    def _manifest(self) -> Manifest | None:
        return self._inspection.document(Manifest, MANIFEST_KEY) if self._has(MANIFEST_KEY) else None

    def _runs_without_plan(self, known: Collection[str]) -> None:
        """Find folders of runs that hold files but have lost their plan."""
        for name in self._blobs.names(RUNS):
            folder = f"{RUNS}/{name}"
            if len(name) != 4 or not (name.isascii() and name.isdecimal()):
                continue
            # The plan is looked up last: it is the first file that a new run writes.
            if name not in known and _holds_anything(self._blobs, folder) and not self._has(plan_key(name)):
                self._inspection.report(
                    plan_key(name),
                    f"is missing, and run {name} has other files; bring it back from a copy, or delete {folder} and "
                    "the arrays of that run",
                    run=name,
                    is_repairable=False,
                )

    def _has(self, key: str) -> bool:
        return self._blobs.head(key) is not None

    def _plan(self, name: str, finished: FinishedRun | None) -> Plan | None:
        """The plan of a run, or its copy in the manifest if it is damaged."""
        copy = None if finished is None else finished.plan
        key, is_repairable = plan_key(name), copy is not None
        plan = self._inspection.document(Plan, key, run=name, is_repairable=is_repairable)
        if plan is not None and (plan.run != name or copy not in (None, plan)):
            self._inspection.report(key, "is not the plan of this run", run=name, is_repairable=is_repairable)
            return copy
        return plan or copy

    def _drop_contradictions(self) -> None:
        """Drop plans that cannot belong to one store together."""
        if self.plans and FIRST_RUN not in self.plans and not self._has_finding(plan_key(FIRST_RUN)):
            self._inspection.report(
                plan_key(FIRST_RUN),
                "is missing, and other runs are there",
                run=FIRST_RUN,
                is_repairable=False,
            )
        for name, problem in contradictions(self.plans).items():
            plan = self.plans.pop(name)
            if not self._has_finding(plan_key(plan.tokens_of)):
                self._inspection.report(plan_key(name), problem, run=name, is_repairable=False)

    def _has_finding(self, key: str) -> bool:
        return any(finding.key == key for finding in self._inspection.findings)

    def _committed(self, plan: Plan, *, is_finished: bool) -> list[int]:
        """The segments that have a record, from one listing."""
        committed = []
        names = self._blobs.names(commits_folder(plan.run))
        files = self._blobs.sizes(commits_folder(plan.run))
        for name in names:
            stem = name.removesuffix(".json")
            index = int(stem) if stem.isascii() and stem.isdecimal() and len(stem) <= 20 else -1
            key = f"{commits_folder(plan.run)}/{name}"
            if name not in files or not _is_key(key):
                problem = (
                    "is neither a commit record nor an object that a repair could remove; remove it by hand"
                )
                self._inspection.report(key, problem, run=plan.run, is_repairable=False)
            elif 0 <= index < plan.n_segments and commit_key(plan.run, index) == key:
                committed.append(index)
            else:
                self._inspection.report(key, "is not a commit record", run=plan.run)
        n_missing = plan.n_segments - len(committed)
        if is_finished and n_missing > _MISSING_NAMED:
            problem = f"says that run {plan.run} is finished, and {n_missing} of its records are missing"
            self._inspection.report(MANIFEST_KEY, problem, run=plan.run)
        elif is_finished and n_missing:
            there = set(committed)
            for index in range(plan.n_segments):
                if index not in there:
                    problem = "is missing, and the manifest says that the run is finished"
                    self._inspection.report(commit_key(plan.run, index), problem, run=plan.run, segment=index)
        return committed

    def _metadata(self, plan: Plan, checked_keys: set[str]) -> None:
        """Check the ``zarr.json`` files that a run needs and earlier runs do not."""
        has_begun = bool(self.committed[plan.run]) or (
            plan.has_own_tokens and self._has(tokens_key(plan.run))
        )
        for key, expected in zarr_documents(plan).items():
            if key not in checked_keys and (has_begun or self._has(key)):
                self._inspection.compare(key, expected, "is not what the plan says", run=plan.run)
            checked_keys.add(key)

    def _tokens(self, plan: Plan, *, is_finished: bool) -> None:
        key = tokens_key(plan.run)
        if self._has(key):
            self.tokens[plan.run] = check_tokens(self._inspection, plan)
            return
        if is_finished:
            # Unless a manifest says that it is finished, this is work left to do, as after a repair.
            problem = "is missing, and the manifest says that the run is finished"
            self._inspection.report(key, problem, run=plan.run)

    def _segments(self, plan: Plan) -> RecordSums:
        """Check the committed segments of a run."""
        of_tokens = self.tokens.get(plan.tokens_of)
        sizes = None if of_tokens is None else of_tokens.sizes
        sums = RecordSums(plan)
        if of_tokens is not None and of_tokens.is_sound and plan.has_own_tokens:
            sums.tokens = of_tokens.record
        vouched = self.vouched[plan.run] = set()
        todo = self.committed[plan.run]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as threads:
            for start in range(0, len(todo), _SEGMENTS_AT_ONCE):
                some = todo[start : start + _SEGMENTS_AT_ONCE]
                for done in threads.map(
                    lambda index: check_segment(self._inspection, plan, index, sizes), some
                ):
                    if done.record is not None:
                        vouched.add(done.index)
                        if done.is_sound:
                            sums.add(done.record)
        return sums


def _is_behind(manifest: Manifest | None, names: Collection[str]) -> bool:
    """Whether a manifest claims to name all runs but does not."""
    if manifest is None or not manifest.sealed:
        return False
    return not {entry.plan.run for entry in manifest.runs}.issuperset(names)


def _holds_anything(blobs: Blobs, folder: str) -> bool:
    """Whether there is a file below a folder; file systems keep empty folders."""
    files = blobs.sizes(folder)
    return bool(files) or any(
        _is_key(f"{folder}/{name}") and _holds_anything(blobs, f"{folder}/{name}")
        for name in blobs.names(folder)
    )


def _is_key(key: str) -> bool:
    """Whether storage can name it: a file system can hold names that are not valid keys."""
    try:
        check_key(key)
    except StorageError:
        return False
    return True

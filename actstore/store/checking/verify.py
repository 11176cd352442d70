"""Checking a store: every byte that is committed, against every record that vouches for it."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs, check_key
from actstore.store.checking.inspection import Inspection, OnObject
from actstore.store.checking.segment_check import check_segment
from actstore.store.checking.summary_check import RecordSums, check_summary
from actstore.store.checking.token_check import CheckedTokens, check_tokens
from actstore.store.checking.verification import Finding
from actstore.store.format.plan import FIRST_RUN, RUNS, Plan
from actstore.store.records.commit import commit_key, commits_folder, plan_key, tokens_key
from actstore.store.records.manifest import MANIFEST_KEY, FinishedRun, Manifest
from actstore.store.records.run import contradictions, run_names
from actstore.store.records.zarr_documents import zarr_documents

_READERS: Final = 4
_SEGMENTS_AT_ONCE: Final = 64
"""Their records are in memory together."""
_MISSING_NAMED: Final = 1000
"""Missing records that are told one by one. A damaged plan can announce more of them than there are bytes."""


class Check:
    """One pass over a store. Whatever is wrong becomes a `Finding`; the pass goes on."""

    def __init__(self, blobs: Blobs, on_object: OnObject = lambda _nbytes: None) -> None:
        self._blobs = blobs
        self._inspection = Inspection(blobs, on_object)
        self.finished: dict[str, FinishedRun] = {}
        """By run: its entry in the manifest."""
        self.plans: dict[str, Plan] = {}
        """By run: those that could be trusted."""
        self.committed: dict[str, list[int]] = {}
        """By run: segments that have a record, damaged or not."""
        self.vouched: dict[str, set[int]] = {}
        """By run: segments with a record that says what their shards are."""
        self.tokens: dict[str, CheckedTokens | None] = {}
        """By run that has a tokens record; None where that is damaged."""

    @property
    def findings(self) -> list[Finding]:
        """By run, then by segment; what belongs to no segment comes first."""
        return sorted(
            self._inspection.findings,
            key=lambda found: (found.run or "", -1 if found.segment is None else found.segment, found.key),
        )

    @property
    def n_objects(self) -> int:
        """That were read."""
        return self._inspection.n_objects

    @property
    def nbytes(self) -> int:
        """Of them."""
        return self._inspection.nbytes

    @property
    def is_complete(self) -> bool:
        """Whether all that was planned is committed."""
        return bool(self.plans) and all(
            len(self.committed[name]) == plan.n_segments and (not plan.has_own_tokens or name in self.tokens)
            for name, plan in self.plans.items()
        )

    def run(self) -> None:
        """Check everything. A store that grows meanwhile is not damaged by that.

        Raises:
            StorageError: storage cannot be listed or reached.
        """
        # What vouches is looked at after what it vouches for was listed: so nothing new can seem to be too much, and
        # nothing that is not there yet can seem to be missing.
        names, manifest = run_names(self._blobs), self._manifest()
        if _is_behind(manifest, names):
            # Whoever began a run just now makes the manifest right after its plan is there.
            names, manifest = run_names(self._blobs), self._manifest()
            if _is_behind(manifest, names):
                self._inspection.found(MANIFEST_KEY, "is sealed, and does not name all runs of the store")
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
        """Folders of runs that hold anything and have lost their plan."""
        for name in self._blobs.names(RUNS):
            folder = f"{RUNS}/{name}"
            if len(name) != 4 or not (name.isascii() and name.isdecimal()):
                continue
            # The plan is looked for last: it is the first thing that is written of a run that begins just now.
            if name not in known and _holds_anything(self._blobs, folder) and not self._has(plan_key(name)):
                self._inspection.found(
                    plan_key(name),
                    f"is missing, and run {name} has other files; bring it back from a copy, or delete {folder} and "
                    "the arrays of that run",
                    run=name,
                    is_repairable=False,
                )

    def _has(self, key: str) -> bool:
        return self._blobs.head(key) is not None

    def _plan(self, name: str, finished: FinishedRun | None) -> Plan | None:
        """The plan of a run; where it is damaged, its copy in the manifest."""
        copy = None if finished is None else finished.plan
        key, is_repairable = plan_key(name), copy is not None
        plan = self._inspection.document(Plan, key, run=name, is_repairable=is_repairable)
        if plan is not None and (plan.run != name or copy not in (None, plan)):
            self._inspection.found(key, "is not the plan of this run", run=name, is_repairable=is_repairable)
            return copy
        return plan or copy

    def _drop_contradictions(self) -> None:
        """Plans that cannot be of one store together."""
        if self.plans and FIRST_RUN not in self.plans and not self._is_found(plan_key(FIRST_RUN)):
            self._inspection.found(
                plan_key(FIRST_RUN),
                "is missing, and other runs are there",
                run=FIRST_RUN,
                is_repairable=False,
            )
        for name, problem in contradictions(self.plans).items():
            plan = self.plans.pop(name)
            if not self._is_found(plan_key(plan.tokens_of)):
                self._inspection.found(plan_key(name), problem, run=name, is_repairable=False)

    def _is_found(self, key: str) -> bool:
        return any(found.key == key for found in self._inspection.findings)

    def _committed(self, plan: Plan, *, is_finished: bool) -> list[int]:
        """Segments that have a record, from one listing."""
        found = []
        names = self._blobs.names(commits_folder(plan.run))
        files = self._blobs.sizes(commits_folder(plan.run))
        for name in names:
            stem = name.removesuffix(".json")
            index = int(stem) if stem.isascii() and stem.isdecimal() and len(stem) <= 20 else -1
            key = f"{commits_folder(plan.run)}/{name}"
            if name not in files or not _is_key(key):
                problem = "is no commit record, and no object that a repair could remove; remove it by hand"
                self._inspection.found(key, problem, run=plan.run, is_repairable=False)
            elif 0 <= index < plan.n_segments and commit_key(plan.run, index) == key:
                found.append(index)
            else:
                self._inspection.found(key, "is no commit record", run=plan.run)
        n_missing = plan.n_segments - len(found)
        if is_finished and n_missing > _MISSING_NAMED:
            problem = f"says that run {plan.run} is finished, and {n_missing} of its records are missing"
            self._inspection.found(MANIFEST_KEY, problem, run=plan.run)
        elif is_finished and n_missing:
            there = set(found)
            for index in range(plan.n_segments):
                if index not in there:
                    problem = "is missing, and the manifest says that the run is finished"
                    self._inspection.found(commit_key(plan.run, index), problem, run=plan.run, segment=index)
        return found

    def _metadata(self, plan: Plan, checked_keys: set[str]) -> None:
        """The ``zarr.json`` files that a run needs, those that earlier ones need left out."""
        has_begun = bool(self.committed[plan.run]) or (
            plan.has_own_tokens and self._has(tokens_key(plan.run))
        )
        for key, expected in zarr_documents(plan).items():
            if key not in checked_keys and (has_begun or self._has(key)):
                self._inspection.same(key, expected, "is not what the plan says", run=plan.run)
            checked_keys.add(key)

    def _tokens(self, plan: Plan, *, is_finished: bool) -> None:
        key = tokens_key(plan.run)
        if self._has(key):
            self.tokens[plan.run] = check_tokens(self._inspection, plan)
            return
        if is_finished:
            # Without a manifest that says so, it is work to be done: a repair leaves a store like that.
            problem = "is missing, and the manifest says that the run is finished"
            self._inspection.found(key, problem, run=plan.run)

    def _segments(self, plan: Plan) -> RecordSums:
        """Check the committed segments of a run."""
        of_tokens = self.tokens.get(plan.tokens_of)
        lengths = None if of_tokens is None else of_tokens.lengths
        sums = RecordSums(plan)
        if of_tokens is not None and of_tokens.is_sound and plan.has_own_tokens:
            sums.tokens = of_tokens.record
        vouched = self.vouched[plan.run] = set()
        todo = self.committed[plan.run]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as threads:
            for start in range(0, len(todo), _SEGMENTS_AT_ONCE):
                some = todo[start : start + _SEGMENTS_AT_ONCE]
                for done in threads.map(
                    lambda index: check_segment(self._inspection, plan, index, lengths), some
                ):
                    if done.record is not None:
                        vouched.add(done.index)
                        if done.is_sound:
                            sums.add(done.record)
        return sums


def _is_behind(manifest: Manifest | None, names: Collection[str]) -> bool:
    """Whether a manifest says that it names all runs, and does not."""
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
    """Whether storage can name it: a file system can hold names that no key has."""
    try:
        check_key(key)
    except StorageError:
        return False
    return True

"""Checking a store: every byte that is committed, against every record that vouches for it."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError, Blobs
from actstore.store.commit import (
    CommitRecord,
    ObjectRecord,
    TokensRecord,
    commit_key,
    commits_folder,
    has_golden,
    plan_key,
    read_commit,
    tokens_key,
)
from actstore.store.layout import ArrayLayout
from actstore.store.manifest import MANIFEST_KEY, FinishedRun, Manifest, RunStatistics, read_manifest
from actstore.store.moments import agree, has_statistics, of_rows
from actstore.store.plan import HookArray, Plan
from actstore.store.run import run_names
from actstore.store.seal import merging
from actstore.store.shard import crc32c
from actstore.store.shard_reader import check_index, decode
from actstore.store.shards_table import from_parquet, shards_table
from actstore.store.statistics import HookStatistics
from actstore.store.verification import Finding
from actstore.store.zarr_documents import zarr_documents

_READERS: Final = 4

OnObject = Callable[[int], None]
"""Called with the size of each object that was checked."""


class Check:
    """One pass over a store. Whatever is wrong becomes a `Finding`; the pass goes on."""

    def __init__(self, blobs: Blobs, on_object: OnObject = lambda _nbytes: None) -> None:
        self._blobs = blobs
        self._on_object = on_object
        self.findings: list[Finding] = []
        self.plans: dict[str, Plan] = {}
        self.committed: dict[str, list[int]] = {}
        """By run: segments that have a record, damaged or not."""
        self.has_tokens: dict[str, bool] = {}
        self._counting = threading.Lock()
        self.n_objects = 0
        self.nbytes = 0

    def run(self) -> None:
        """Check everything.

        Raises:
            StorageError: storage cannot be listed or reached.
        """
        manifest = self._manifest()
        finished = {} if manifest is None else {entry.plan.run: entry for entry in manifest.runs}
        names = sorted({*run_names(self._blobs), *finished})
        if manifest is not None and manifest.sealed and names != sorted(finished):
            self._found(MANIFEST_KEY, "is sealed, and does not name all runs of the store")
        for name in names:
            plan = self._plan(name, finished.get(name))
            if plan is not None:
                self.plans[name] = plan
        for name, plan in self.plans.items():
            self._metadata(plan)
            tokens = self._tokens(plan) if plan.has_own_tokens else None
            whole = _Whole(plan)
            self._segments(plan, whole)
            if name in finished:
                self._summary(finished[name], whole, tokens)
        self.findings.sort(key=lambda finding: (finding.run or "", finding.segment or -1, finding.key))

    @property
    def is_complete(self) -> bool:
        return bool(self.plans) and all(
            len(self.committed[name]) == plan.n_segments
            and (not plan.has_own_tokens or self.has_tokens[name])
            for name, plan in self.plans.items()
        )

    def _found(self, key: str, problem: str, **fields: Any) -> None:
        self.findings.append(Finding(key, problem, **fields))

    def _read(self, key: str) -> Any:
        """Bytes of an object, counted."""
        data = self._blobs.read(key)
        with self._counting:
            self.n_objects += 1
            self.nbytes += len(data)
            self._on_object(len(data))
        return data

    def _problem(self, error: StorageError) -> str:
        """A sentence about a key, from one that names the whole URL."""
        if isinstance(error, BlobNotFoundError):
            return "is missing"
        return str(error).split(" ", 1)[-1]

    def _manifest(self) -> Manifest | None:
        try:
            manifest = read_manifest(self._blobs)
            if manifest is not None:
                self._same_spelling(MANIFEST_KEY, manifest.to_bytes())
        except StorageError as error:
            self._found(MANIFEST_KEY, self._problem(error))
            return None
        return manifest

    def _same_spelling(self, key: str, expected: bytes, **fields: Any) -> None:
        if bytes(self._read(key)) != expected:
            self._found(key, "is not spelled as this format spells it", **fields)

    def _plan(self, name: str, finished: FinishedRun | None) -> Plan | None:
        """The plan of a run; where it is damaged, its copy in the manifest."""
        copy = None if finished is None else finished.plan
        key = plan_key(name)
        try:
            plan = Plan.from_bytes(bytes(self._read(key)), key)
        except StorageError as error:
            self._found(key, self._problem(error), run=name, is_repairable=copy is not None)
            return copy
        if plan.run != name or (copy is not None and copy != plan):
            self._found(key, "is not the plan of this run", run=name, is_repairable=copy is not None)
            return copy
        self._same_spelling(key, plan.to_bytes(), run=name)
        return plan

    def _metadata(self, plan: Plan) -> None:
        for key, expected in zarr_documents(plan).items():
            try:
                if bytes(self._read(key)) != expected:
                    self._found(key, "is not what the plan says", run=plan.run)
            except StorageError as error:
                self._found(key, self._problem(error), run=plan.run)

    # Tokens

    def _tokens(self, plan: Plan) -> TokensRecord | None:
        key = tokens_key(plan.run)
        self.has_tokens[plan.run] = self._blobs.head(key) is not None
        if not self.has_tokens[plan.run]:
            return None
        try:
            record = TokensRecord.from_bytes(bytes(self._read(key)), key)
        except StorageError as error:
            self._found(key, self._problem(error), run=plan.run)
            return None
        places = [(layout, i) for layout in plan.token_arrays() for i in range(layout.n_shards)]
        if [shard.key for shard in record.shards] != [layout.key(i) for layout, i in places]:
            self._found(key, "does not name the shards of the token arrays", run=plan.run)
            return None
        ids, n_tokens = hashlib.sha256(), 0
        before = len(self.findings)
        for (layout, index), shard in zip(places, record.shards, strict=True):
            rows = self._shard(layout, index, shard, run=plan.run)
            if rows is not None and layout == plan.token_array("tokens"):
                ids.update(np.ascontiguousarray(rows).data)
            elif rows is not None and layout == plan.token_array("lengths"):
                n_tokens += int(rows.sum())
        if len(self.findings) == before:
            if ids.hexdigest() != plan.tokens_sha256:
                self._found(key, "is over other tokens than the plan: not each packed row once", run=plan.run)
            if n_tokens != plan.n_tokens:
                self._found(
                    key, f"is over {n_tokens} tokens where {plan.n_tokens} were planned", run=plan.run
                )
        return record

    def _lengths(self, plan: Plan) -> NDArray[Any] | None:
        """Real tokens of each sequence; None where they cannot be read."""
        own = self.plans.get(plan.tokens_of)
        if own is None:
            return None
        layout = own.token_array("lengths")
        try:
            shards = [decode(layout, i, self._blobs.read(layout.key(i))) for i in range(layout.n_shards)]
        except StorageError:
            return None  # told when the tokens were checked
        return np.concatenate(shards)

    # Segments

    def _segments(self, plan: Plan, whole: "_Whole") -> None:
        """Check the committed segments of a run."""
        self.committed[plan.run] = []
        for name in self._blobs.names(commits_folder(plan.run)):
            stem = name.removesuffix(".json")
            is_known = len(name) == 13 and stem.isdecimal() and int(stem) < plan.n_segments
            if is_known and name == f"{int(stem):08d}.json":
                self.committed[plan.run].append(int(stem))
            else:
                self._found(f"{commits_folder(plan.run)}/{name}", "is no commit record", run=plan.run)
        lengths = self._lengths(plan)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as threads:
            checks = [
                threads.submit(self._segment, plan, index, lengths) for index in self.committed[plan.run]
            ]
            for done in as_completed(checks):
                record = done.result()
                checks.remove(done)  # it holds the record
                if record is not None:
                    whole.add(record)

    def _segment(self, plan: Plan, index: int, lengths: NDArray[Any] | None) -> CommitRecord | None:
        key = commit_key(plan.run, index)
        where: dict[str, Any] = {"run": plan.run, "segment": index}
        try:
            record = read_commit(self._blobs, plan, index)
        except StorageError as error:
            self._found(key, self._problem(error), **where)
            return None
        self._same_spelling(key, record.to_bytes(), **where)
        segment = plan.segment(index)
        here = None if lengths is None else lengths[segment.start : segment.stop]
        if here is not None and record.n_tokens != int(here.sum()):
            self._found(key, f"counts {record.n_tokens} tokens, and there are {int(here.sum())}", **where)
        if (record.golden is not None) != has_golden(index):
            self._found(key, "has a golden row where none belongs, or none where one does", **where)
        counted = {hook.name for hook in plan.request.hooks if has_statistics(hook)}
        if record.statistics.keys() != counted:
            self._found(key, "does not have the statistics of the hooks of the plan", **where)
            return None
        for hook in plan.request.hooks:
            rows = self._shard(plan.activations(hook), index, record.shards[hook.name], **where)
            if rows is not None and here is not None and hook.name in record.statistics:
                self._statistics(plan, index, hook, rows, here, record.statistics[hook.name])
        return record

    def _statistics(
        self,
        plan: Plan,
        index: int,
        hook: HookArray,
        rows: NDArray[Any],
        lengths: NDArray[Any],
        stored: HookStatistics,
    ) -> None:
        key = commit_key(plan.run, index)
        request = plan.request
        try:
            stored.check(hook.shape, key)
        except StorageError as error:
            self._found(key, self._problem(error), run=plan.run, segment=index)
            return
        recomputed = of_rows(
            hook, rows, request.dtype, lengths, request.batch_size, covariance=request.covariance
        )
        problem = agree(stored, recomputed)
        if problem is not None:
            self._found(
                key,
                f"has other statistics of {hook.name} than its values: {problem}",
                run=plan.run,
                segment=index,
            )
        if stored.n_not_finite:
            self._found(
                plan.activations(hook).key(index),
                f"holds NaN or infinity in {stored.n_not_finite} tokens, as the model computed them",
                run=plan.run,
                segment=index,
                severity="warning",
            )

    def _shard(
        self, layout: ArrayLayout, index: int, record: ObjectRecord, **where: Any
    ) -> NDArray[Any] | None:
        """Check one shard; its rows, without padding, if they can be trusted."""
        key = layout.key(index)
        try:
            data = np.frombuffer(self._read(key), dtype=np.uint8)
            if len(data) != record.nbytes:
                self._found(key, f"has {len(data)} bytes where {record.nbytes} were committed", **where)
                return None
            found = crc32c(data)
            if found != record.crc32c:
                self._found(key, f"has crc32c {found} where {record.crc32c} was committed", **where)
                return None
            check_index(layout, index, data)
            return decode(layout, index, data)
        except StorageError as error:
            self._found(key, self._problem(error), **where)
            return None

    # The manifest

    def _summary(self, finished: FinishedRun, whole: "_Whole", tokens: TokensRecord | None) -> None:
        """Check the files of a finished run against its records, if these are whole themselves."""
        plan = finished.plan
        where = {"run": plan.run}
        n_missing = plan.n_segments - len(self.committed[plan.run])
        if n_missing:
            self._found(
                MANIFEST_KEY,
                f"says that run {plan.run} is finished, and {n_missing} of its records are missing",
                **where,
            )
        is_whole = len(whole.shards) == plan.n_segments and (tokens is not None) == plan.has_own_tokens
        for record in (finished.shards, finished.statistics):
            try:
                data = bytes(self._read(record.key))
                if (len(data), crc32c(data)) != (record.nbytes, record.crc32c):
                    self._found(record.key, "is not what the manifest points to", **where)
                elif is_whole and not whole.agrees(record.key, data, tokens):
                    self._found(record.key, "does not say what the commit records say", **where)
            except StorageError as error:
                self._found(record.key, self._problem(error), **where)


class _Whole:
    """What the records of a run say together, without the records."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.shards: dict[int, dict[str, ObjectRecord]] = {}
        """By segment and hook."""
        self._statistics = merging(plan)

    def add(self, record: CommitRecord) -> None:
        self.shards[record.segment] = record.shards
        for name, found in record.statistics.items():
            self._statistics[name].add(found)

    def agrees(self, key: str, data: bytes, tokens: TokensRecord | None) -> bool:
        """Whether a file of the manifest says the same."""
        if key.endswith(".parquet"):
            expected = shards_table(self._plan, self.shards, tokens)
            # Parquet of another version of pyarrow has other bytes.
            return bool(expected.equals(from_parquet(data, n_rows=expected.num_rows)))
        statistics = {name: total.record() for name, total in self._statistics.items()}
        return data == RunStatistics(hooks=statistics).to_bytes()

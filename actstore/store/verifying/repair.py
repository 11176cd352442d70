"""Repair: removing what is damaged, so that the next extraction makes exactly that again."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.store.format.plan import Plan
from actstore.store.records.commit import (
    ObjectRecord,
    columns_folder,
    columns_key,
    commit_key,
    commits_folder,
    plan_key,
    tokens_key,
)
from actstore.store.records.manifest import (
    MANIFEST_KEY,
    Manifest,
    shards_key,
    statistics_key,
    update_manifest,
)
from actstore.store.records.shards_table import of_plan
from actstore.store.records.zarr_documents import zarr_documents
from actstore.store.verifying.findings import Finding
from actstore.store.verifying.norm_restore import restored_norms
from actstore.store.verifying.token_restore import Proven, proven_tokens, tokens_record
from actstore.store.verifying.verify import Check

_TABLE: Final = re.compile(r"([0-9]{8})\.parquet")
_SHARD: Final = re.compile(r"c\.(0|[1-9][0-9]{0,15})(\.0)*")


def repair(
    blobs: Blobs, check: Check, findings: Iterable[Finding], fence: Callable[[], None] = lambda: None
) -> list[str]:
    """Remove damaged objects, every record that vouches for one of them, and shards that no record vouches for: nobody
    can tell whether those are intact, and an extraction would adopt them. Nobody may write meanwhile.

    What can be written again is not removed: a plan from its copy in the manifest, Zarr metadata from the plan, the
    record of tokens from intact token shards and tables of kept columns, and norms from intact activations. If a commit
    record is lost, the shards that the run's table of shards vouches for stay, except norms.

    Args:
        blobs: the storage of the store.
        check: the check that was run.
        findings: the findings of that check and of a deep check.
        fence: called before each change; it raises if somebody else may write by now.

    Returns:
        The keys of the objects that were removed or written again.

    Raises:
        StorageError: removing failed; repeat the repair.
    """
    damage = [finding for finding in findings if finding.severity == "damage" and finding.is_repairable]
    removed: list[str] = []

    def remove(key: str) -> None:
        if key not in removed and blobs.head(key) is not None:
            fence()
            blobs.delete(key)
            removed.append(key)

    def write_again(key: str, data: bytes) -> None:
        fence()
        blobs.delete(key)
        blobs.create(key, [data])
        removed.append(key)

    # Read the tables of shards while they are there; they may have to be removed.
    damaged = {finding.key for finding in damage}
    tables = {name: _table(blobs, check, plan, damaged) for name, plan in check.plans.items()}
    tokens = {
        name: _proven(blobs, check, plan, tables[name])
        for name, plan in check.plans.items()
        if plan.has_own_tokens
        and (check.tokens.get(name) is None or tokens_key(name) in damaged)
        and not any(_is_token_shard(finding, plan) for finding in damage)
    }
    unnamed = list(_without_record(blobs, check, tables, tokens))

    # Plans come before the manifest, which may have the only copy of a plan.
    for finding in damage:
        plan = check.plans.get(finding.run or "")
        derived = {} if plan is None else {plan_key(plan.run): plan.to_bytes()} | zarr_documents(plan)
        if finding.key in derived:
            write_again(finding.key, derived[finding.key])
    for name, proven in tokens.items():
        record = tokens_record(check.plans[name], proven)
        if record is not None:
            write_again(tokens_key(name), record.to_bytes())
    for finding in damage:
        shard = _norms_again(blobs, check, finding, damage)
        if shard is not None and finding.key not in removed:
            write_again(finding.key, shard)
    damage = [finding for finding in damage if finding.key not in removed]
    # Then what is trusted most: if the repair is killed in between, the store says less, never more.
    runs = {finding.run for finding in damage if finding.run is not None and not _is_stray(finding)}
    if any(finding.key == MANIFEST_KEY for finding in damage):
        remove(MANIFEST_KEY)
    elif runs and blobs.head(MANIFEST_KEY) is not None:
        fence()
        update_manifest(blobs, lambda manifest: _without(manifest, runs))
    for run in sorted(runs):
        remove(shards_key(run))
        remove(statistics_key(run))
    for finding in damage:
        if finding.run is not None and finding.segment is not None:
            remove(commit_key(finding.run, finding.segment))
            if check.plans[finding.run].norms:
                # Stored norms would conflict with those of values that are computed again, perhaps on another
                # machine.
                remove(check.plans[finding.run].norm_array().key(finding.segment))
        if _is_token_shard(finding, check.plans.get(finding.run or "")):
            remove(tokens_key(finding.run or ""))
    for finding in damage:
        remove(finding.key)
    for key, record_key in unnamed:
        # All remaining records are intact, even those of a writer of an older version, which takes no lease.
        if blobs.head(record_key) is None:
            remove(key)
    return removed


def _without(manifest: Manifest, runs: Collection[str]) -> Manifest:
    kept = tuple(finished for finished in manifest.runs if finished.plan.run not in runs)
    return Manifest(sealed=manifest.sealed and len(kept) == len(manifest.runs), runs=kept)


def _norms_again(blobs: Blobs, check: Check, finding: Finding, damage: Collection[Finding]) -> bytes | None:
    """The bytes of a damaged norm shard, if the rest of its segment is intact and gives them."""
    plan = check.plans.get(finding.run or "")
    if plan is None or finding.segment is None or not plan.norms:
        return None
    of_tokens = check.tokens.get(plan.tokens_of)
    if finding.key != plan.norm_array().key(finding.segment) or of_tokens is None or of_tokens.sizes is None:
        return None
    if any(
        (other.run, other.segment) == (finding.run, finding.segment) and other.key != finding.key
        for other in damage
    ):
        return None
    return restored_norms(blobs, plan, finding.segment, of_tokens.sizes)


def _is_stray(finding: Finding) -> bool:
    """Whether the object never belonged to the store, so that nothing has to be computed again."""
    return (
        finding.run is not None
        and finding.segment is None
        and finding.key.startswith(f"{commits_folder(finding.run)}/")
    )


def _is_token_shard(finding: Finding, plan: Plan | None) -> bool:
    """Whether an object is one that the record of the tokens names, a shard or a table of kept columns."""
    if plan is None:
        return False
    starts = (f"{columns_folder(plan.run)}/", *(f"{layout.path}/c." for layout in plan.token_arrays()))
    return finding.key.startswith(starts)


def _table(blobs: Blobs, check: Check, plan: Plan, damaged: Collection[str]) -> dict[str, ObjectRecord]:
    """The shards of a finished run by key, from its table; empty if the table is not the one that the manifest points
    to.
    """
    key = shards_key(plan.run)
    is_needed = len(check.vouched[plan.run]) < plan.n_segments or (
        plan.has_own_tokens and (check.tokens.get(plan.run) is None or tokens_key(plan.run) in damaged)
    )
    if not is_needed or plan.run not in check.finished or key in damaged:
        return {}
    try:
        table = of_plan(bytes(blobs.read(key)), plan)
    except StorageError:
        return {}
    columns = (table[name].to_pylist() for name in ("key", "nbytes", "crc32c"))
    return {
        key: ObjectRecord(key=key, nbytes=nbytes, crc32c=checksum)
        for key, nbytes, checksum in zip(*columns, strict=True)
    }


def _proven(blobs: Blobs, check: Check, plan: Plan, table: Mapping[str, ObjectRecord]) -> Proven:
    """The proven token shards of a run whose tokens record is missing or not in canonical form."""
    record = check.tokens.get(plan.run)
    if record is not None:
        named = (*record.record.shards, *record.record.tables)
        return proven_tokens(blobs, plan, {blob.key: blob for blob in named})
    return proven_tokens(blobs, plan, table)


def _without_record(
    blobs: Blobs,
    check: Check,
    tables: Mapping[str, Mapping[str, ObjectRecord]],
    tokens: Mapping[str, Proven],
) -> Iterator[tuple[str, str]]:
    """Yield the key of each shard, and of each table of kept columns, that no record vouches for, with the key of the
    record that could: they were left by killed writers, or their record is damaged.
    """
    for name, plan in check.plans.items():
        if plan.has_own_tokens and check.tokens.get(name) is None:
            proven = tokens.get(name, {})
            for file in blobs.names(columns_folder(name)):
                key = f"{columns_folder(name)}/{file}"
                number = _TABLE.fullmatch(file)
                if number is None or key != columns_key(name, int(number[1])):
                    continue
                if key not in proven and not _is_as_said(blobs, key, tables[name].get(key)):
                    yield key, tokens_key(name)
        of_segments = plan.segment_arrays()
        layouts = [(layout, check.vouched[name]) for layout in of_segments]
        if plan.has_own_tokens and check.tokens.get(name) is None:
            layouts += [(layout, set()) for layout in plan.token_arrays()]
        proven = tokens.get(name, {})
        for layout, vouched in layouts:
            for file in blobs.names(layout.path):
                parts = _SHARD.fullmatch(file)
                key = f"{layout.path}/{file}"
                if parts is None or key != layout.key(int(parts[1])) or int(parts[1]) in vouched:
                    continue
                # Norms may belong to values that are removed, and are cheap to compute again.
                is_of_norms = plan.norms and layout == plan.norm_array()
                if is_of_norms or (key not in proven and not _is_as_said(blobs, key, tables[name].get(key))):
                    yield key, commit_key(name, int(parts[1])) if layout in of_segments else tokens_key(name)


def _is_as_said(blobs: Blobs, key: str, record: ObjectRecord | None) -> bool:
    """Whether a shard agrees with its entry in the table of the run."""
    try:
        data = b"" if record is None else blobs.read(key)
    except StorageError:
        return False
    return record is not None and record.is_of(data)

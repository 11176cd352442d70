"""Repair: what is damaged is removed, so that the next extraction makes exactly that again."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.store.checking.norm_restore import restored_norms
from actstore.store.checking.token_restore import Proven, proven_tokens, tokens_record
from actstore.store.checking.verification import Finding
from actstore.store.checking.verify import Check
from actstore.store.format.plan import Plan
from actstore.store.records.commit import ObjectRecord, commit_key, commits_folder, plan_key, tokens_key
from actstore.store.records.manifest import (
    MANIFEST_KEY,
    Manifest,
    shards_key,
    statistics_key,
    update_manifest,
)
from actstore.store.records.shards_table import from_parquet
from actstore.store.records.zarr_documents import zarr_documents

_SHARD: Final = re.compile(r"c\.(0|[1-9][0-9]{0,15})(\.0)*")


def repair(
    blobs: Blobs, check: Check, findings: Iterable[Finding], fence: Callable[[], None] = lambda: None
) -> list[str]:
    """Remove damaged objects, every record that vouches for one of them, and shards that nothing vouches for: nobody
    can tell whether they are whole, and an extraction would take them over. Nobody may write meanwhile.

    What can be is written again instead: a plan from its copy in the manifest, Zarr metadata from the plan, the record
    of tokens from whole token shards, and norms from whole activations. Where a commit record is lost, the shards stay
    that the run's table of shards vouches for, but for norms.

    Args:
        blobs: the store.
        check: that was run.
        findings: its own, and those of a deep check.
        fence: called before each change; it raises where somebody may write by now.

    Returns:
        Keys of the objects that were removed, or written again.

    Raises:
        StorageError: removing failed; repeat the repair.
    """
    damage = [found for found in findings if found.severity == "damage" and found.is_repairable]
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

    # While the tables of shards are there, which may have to go.
    damaged = {found.key for found in damage}
    tables = {name: _table(blobs, check, plan, damaged) for name, plan in check.plans.items()}
    tokens = {
        name: _proven(blobs, check, plan, tables[name])
        for name, plan in check.plans.items()
        if plan.has_own_tokens
        and (check.tokens.get(name) is None or tokens_key(name) in damaged)
        and not any(_is_token_shard(found, plan) for found in damage)
    }
    unnamed = list(_without_record(blobs, check, tables, tokens))

    # The manifest has the only copy of a plan, so plans come before it.
    for found in damage:
        plan = check.plans.get(found.run or "")
        derived = {} if plan is None else {plan_key(plan.run): plan.to_bytes()} | zarr_documents(plan)
        if found.key in derived:
            write_again(found.key, derived[found.key])
    for name, proven in tokens.items():
        record = tokens_record(check.plans[name], proven)
        if record is not None:
            write_again(tokens_key(name), record.to_bytes())
    for found in damage:
        shard = _norms_again(blobs, check, found, damage)
        if shard is not None and found.key not in removed:
            write_again(found.key, shard)
    damage = [found for found in damage if found.key not in removed]
    # Then what is trusted most: whoever is killed in between leaves a store that says less, never more.
    runs = {found.run for found in damage if found.run is not None and not _is_stray(found)}
    if any(found.key == MANIFEST_KEY for found in damage):
        remove(MANIFEST_KEY)
    elif runs and blobs.head(MANIFEST_KEY) is not None:
        fence()
        update_manifest(blobs, lambda manifest: _without(manifest, runs))
    for run in sorted(runs):
        remove(shards_key(run))
        remove(statistics_key(run))
    for found in damage:
        if found.run is not None and found.segment is not None:
            remove(commit_key(found.run, found.segment))
            if check.plans[found.run].norms:
                # Those of values that are made again, perhaps on another machine, would be in the way.
                remove(check.plans[found.run].norm_array().key(found.segment))
        if _is_token_shard(found, check.plans.get(found.run or "")):
            remove(tokens_key(found.run or ""))
    for found in damage:
        remove(found.key)
    for key, record_key in unnamed:
        # All records that are there by now are whole: a writer of an older version, which nobody hears of, makes them.
        if blobs.head(record_key) is None:
            remove(key)
    return removed


def _without(manifest: Manifest, runs: Collection[str]) -> Manifest:
    kept = tuple(finished for finished in manifest.runs if finished.plan.run not in runs)
    return Manifest(sealed=manifest.sealed and len(kept) == len(manifest.runs), runs=kept)


def _norms_again(blobs: Blobs, check: Check, found: Finding, damage: Collection[Finding]) -> bytes | None:
    """What a damaged shard of norms was, if the rest of its segment is whole and tells."""
    plan = check.plans.get(found.run or "")
    if plan is None or found.segment is None or not plan.norms:
        return None
    of_tokens = check.tokens.get(plan.tokens_of)
    if found.key != plan.norm_array().key(found.segment) or of_tokens is None or of_tokens.lengths is None:
        return None
    if any(
        (other.run, other.segment) == (found.run, found.segment) and other.key != found.key
        for other in damage
    ):
        return None
    return restored_norms(blobs, plan, found.segment, of_tokens.lengths)


def _is_stray(found: Finding) -> bool:
    """Whether it is about something that never belonged to the store, so that nothing need be made again."""
    return (
        found.run is not None
        and found.segment is None
        and found.key.startswith(f"{commits_folder(found.run)}/")
    )


def _is_token_shard(found: Finding, plan: Plan | None) -> bool:
    return plan is not None and any(
        found.key.startswith(f"{layout.path}/c.") for layout in plan.token_arrays()
    )


def _table(blobs: Blobs, check: Check, plan: Plan, damaged: Collection[str]) -> dict[str, ObjectRecord]:
    """Shards of a finished run by key, as its table says; empty unless that is what the manifest points to."""
    key = shards_key(plan.run)
    is_needed = len(check.vouched[plan.run]) < plan.n_segments or (
        plan.has_own_tokens and (check.tokens.get(plan.run) is None or tokens_key(plan.run) in damaged)
    )
    if not is_needed or plan.run not in check.finished or key in damaged:
        return {}
    n_rows = sum(layout.n_shards for layout in plan.arrays())
    try:
        table = from_parquet(bytes(blobs.read(key)), n_rows=n_rows)
    except StorageError:
        return {}
    columns = (table[name].to_pylist() for name in ("key", "nbytes", "crc32c"))
    return {
        key: ObjectRecord(key=key, nbytes=nbytes, crc32c=checksum)
        for key, nbytes, checksum in zip(*columns, strict=True)
    }


def _proven(blobs: Blobs, check: Check, plan: Plan, table: Mapping[str, ObjectRecord]) -> Proven:
    """Token shards of a run that has no record of them, or one that is spelled in another way."""
    record = check.tokens.get(plan.run)
    if record is not None:
        return proven_tokens(blobs, plan, {shard.key: shard for shard in record.record.shards})
    return proven_tokens(blobs, plan, table)


def _without_record(
    blobs: Blobs,
    check: Check,
    tables: Mapping[str, Mapping[str, ObjectRecord]],
    tokens: Mapping[str, Proven],
) -> Iterator[tuple[str, str]]:
    """Keys of shards that nothing vouches for, each with that of the record which could: left by killed writers, or
    their record is damaged.
    """
    for name, plan in check.plans.items():
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
                # Norms may be of values that go, and cost little to make again.
                is_of_norms = plan.norms and layout == plan.norm_array()
                if is_of_norms or (key not in proven and not _is_as_said(blobs, key, tables[name].get(key))):
                    yield key, commit_key(name, int(parts[1])) if layout in of_segments else tokens_key(name)


def _is_as_said(blobs: Blobs, key: str, record: ObjectRecord | None) -> bool:
    """Whether a shard is the one that the table of its run names."""
    try:
        data = b"" if record is None else blobs.read(key)
    except StorageError:
        return False
    return record is not None and record.is_of(data)

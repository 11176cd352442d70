"""Sealing: writing what the commit records of a finished run say into two files, and pointing the manifest to them."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Final

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c
from actstore.store.locking.turns import remove_leases
from actstore.store.records.commit import (
    ObjectRecord,
    TokensRecord,
    committed,
    read_commits,
    read_plan,
    tokens_key,
)
from actstore.store.records.manifest import (
    FinishedRun,
    Manifest,
    RunStatistics,
    read_manifest,
    shards_key,
    statistics_key,
    update_manifest,
)
from actstore.store.records.run import run_names
from actstore.store.statistics.merging import Merging
from actstore.store.statistics.moments import has_statistics

SCRATCH: Final = ("_actstore/partial", "_actstore/probe")
"""Folders that are never part of a store. Neither are leases; see `actstore.store.locking.turns`."""


def seal(blobs: Blobs) -> frozenset[str]:
    """Add every complete run to the manifest. It can be repeated after an interruption at any point.

    Returns:
        The names of the runs whose records were all read for it.

    Raises:
        StorageError: a record is damaged, or writing failed.
    """
    present = read_manifest(blobs)
    known = set() if present is None else {finished.plan.run for finished in present.runs}
    names = run_names(blobs)
    if present is not None and present.sealed and known.issuperset(names):
        return frozenset()
    new = {}
    for name in names:
        plan = read_plan(blobs, name)
        if name not in known and plan is not None and _is_complete(blobs, plan):
            new[name] = _compact(blobs, plan)

    def with_new(manifest: Manifest) -> Manifest:
        # Runs in the manifest stay: their files are those that its writer made.
        runs = new | {finished.plan.run: finished for finished in manifest.runs}
        is_all = set(runs) == set(run_names(blobs))
        return Manifest(sealed=is_all, runs=tuple(runs[name] for name in sorted(runs)))

    manifest = update_manifest(blobs, with_new)
    if manifest.sealed and not {finished.plan.run for finished in manifest.runs}.issuperset(run_names(blobs)):
        # A run began between the listing and the manifest, and its writer may have looked at the manifest just
        # before.
        unseal(blobs)
    return frozenset(new)


def unseal(blobs: Blobs) -> None:
    """Mark that another run begins, so that readers look for it. Call it before the plan of the run is written, and
    again afterwards, since the store may have been sealed in between.
    """
    if read_manifest(blobs) is not None:
        update_manifest(blobs, lambda manifest: manifest.model_copy(update={"sealed": False}))


def is_sealed(blobs: Blobs) -> bool:
    """Whether the manifest names all runs of the store."""
    manifest = read_manifest(blobs)
    return manifest is not None and manifest.sealed


def remove_scratch(blobs: Blobs, leases: Mapping[str, str] | None = None, seconds: float = 0.0) -> None:
    """Remove files of killed writers. A writer that is still at work writes its file again.

    Leases are removed if their holder is known to be gone; leases of segments are removed once the store is sealed,
    since no segment is left that they could be for.

    Args:
        blobs: the storage of the store.
        leases: an earlier result of `lease_tags`; leases that were not renewed since are removed as well.
        seconds: the age of that result, in seconds.
    """
    with contextlib.suppress(StorageError):  # this role may not delete
        remove_leases(blobs, leases or {}, seconds, is_sealed=is_sealed(blobs))
    for folder in SCRATCH:
        for name in blobs.names(folder):
            with contextlib.suppress(StorageError):
                blobs.delete(f"{folder}/{name}")


def _is_complete(blobs: Blobs, plan: Plan) -> bool:
    has_tokens = not plan.has_own_tokens or blobs.head(tokens_key(plan.run)) is not None
    return has_tokens and len(committed(blobs, plan)) == plan.n_segments


def _compact(blobs: Blobs, plan: Plan) -> FinishedRun:
    """Write what the records of a complete run say into two files."""
    from actstore.store.records.shards_table import is_table, shards_table, to_parquet

    shards: dict[int, tuple[ObjectRecord, ...]] = {}
    statistics = merging(plan)
    for record in read_commits(blobs, plan, range(plan.n_segments)):
        shards[record.segment] = record.objects(plan)
        for name, hook_statistics in record.statistics.items():
            statistics[name].add(hook_statistics)
    tokens = TokensRecord.read(blobs, tokens_key(plan.run)) if plan.has_own_tokens else None
    table = shards_table(plan, shards, tokens)
    merged = RunStatistics(hooks={name: total.record() for name, total in statistics.items()})
    return FinishedRun(
        plan=plan,
        shards=_create(blobs, shards_key(plan.run), to_parquet(table), lambda data: is_table(data, table)),
        statistics=_create(blobs, statistics_key(plan.run), merged.to_bytes(), lambda _: False),
    )


def merging(plan: Plan) -> dict[str, Merging]:
    """An empty sum for each hook of a run that has statistics."""
    return {hook.name: Merging(hook.shape) for hook in plan.request.hooks if has_statistics(hook)}


def _create(blobs: Blobs, key: str, data: bytes, says_the_same: Callable[[bytes], bool]) -> ObjectRecord:
    """Write a file of the manifest, or adopt an existing one with the same content."""
    if not blobs.create(key, [data]):
        present = bytes(blobs.read(key))
        if present == data or says_the_same(present):
            return ObjectRecord(key=key, nbytes=len(present), crc32c=crc32c(present))
        # It was left before a repair, or is damaged; no manifest points to it, otherwise `seal` would not write
        # it.
        blobs.delete(key)
        if not blobs.create(key, [data]):
            raise StorageError(
                f"{blobs.url}/{key} is being written by another process; run the same command again"
            )
    return ObjectRecord(key=key, nbytes=len(data), crc32c=crc32c(data))

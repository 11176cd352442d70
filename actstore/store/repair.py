"""Repair: what is damaged is removed, so that the next extraction makes exactly that again."""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from actstore.store.blobs import Blobs
from actstore.store.commit import commit_key, commits_folder, plan_key, tokens_key
from actstore.store.manifest import MANIFEST_KEY, Manifest, shards_key, statistics_key, update_manifest
from actstore.store.plan import Plan
from actstore.store.verification import Finding
from actstore.store.verify import Check
from actstore.store.zarr_documents import zarr_documents

_SHARD: Final = re.compile(r"c\.(0|[1-9][0-9]{0,15})(\.0)*")


def repair(blobs: Blobs, check: Check, findings: Iterable[Finding]) -> list[str]:
    """Remove damaged objects, every record that vouches for one of them, and shards that no record vouches for: nobody
    can tell whether they are whole, and an extraction would take them over. Nobody may write meanwhile.

    A damaged plan is written again from its copy in the manifest, and Zarr metadata from the plan.

    Args:
        blobs: the store.
        check: that was run.
        findings: its own, and those of a deep check.

    Returns:
        Keys of the objects that were removed, or written again.

    Raises:
        StorageError: removing failed; repeat the repair.
    """
    damage = [found for found in findings if found.severity == "damage" and found.is_repairable]
    removed: list[str] = []

    def remove(key: str) -> None:
        if key not in removed and blobs.head(key) is not None:
            blobs.delete(key)
            removed.append(key)

    # The manifest has the only copy of a plan, so plans come before it.
    for found in damage:
        plan = check.plans.get(found.run or "")
        derived = {} if plan is None else {plan_key(plan.run): plan.to_bytes()} | zarr_documents(plan)
        if found.key in derived:
            blobs.delete(found.key)
            blobs.create(found.key, [derived[found.key]])
            removed.append(found.key)
    damage = [found for found in damage if found.key not in removed]
    # Then what is trusted most: whoever is killed in between leaves a store that says less, never more.
    runs = {found.run for found in damage if found.run is not None and not _is_stray(found)}
    if any(found.key == MANIFEST_KEY for found in damage):
        remove(MANIFEST_KEY)
    elif runs and blobs.head(MANIFEST_KEY) is not None:
        update_manifest(blobs, lambda manifest: _without(manifest, runs))
    for run in sorted(runs):
        remove(shards_key(run))
        remove(statistics_key(run))
    for found in damage:
        if found.run is not None and found.segment is not None:
            remove(commit_key(found.run, found.segment))
        if _is_token_shard(found, check.plans.get(found.run or "")):
            remove(tokens_key(found.run or ""))
    for found in damage:
        remove(found.key)
    for key in _without_record(blobs, check):
        remove(key)
    return removed


def _without(manifest: Manifest, runs: Collection[str]) -> Manifest:
    kept = tuple(finished for finished in manifest.runs if finished.plan.run not in runs)
    return Manifest(sealed=manifest.sealed and len(kept) == len(manifest.runs), runs=kept)


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


def _without_record(blobs: Blobs, check: Check) -> Iterator[str]:
    """Keys of shards that no readable record names: left by killed writers, or their record is damaged."""
    for plan in check.plans.values():
        layouts = [(plan.activations(hook), check.vouched[plan.run]) for hook in plan.request.hooks]
        if plan.has_own_tokens and check.tokens.get(plan.run) is None:
            layouts += [(layout, set()) for layout in plan.token_arrays()]
        for layout, vouched in layouts:
            for name in blobs.names(layout.path):
                parts = _SHARD.fullmatch(name)
                key = f"{layout.path}/{name}"
                if parts is not None and key == layout.key(int(parts[1])) and int(parts[1]) not in vouched:
                    yield key

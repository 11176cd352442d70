"""Repair: what is damaged is removed, so that the next extraction makes exactly that again."""

from collections.abc import Iterable, Mapping

from actstore.store.blobs import Blobs
from actstore.store.commit import commit_key, plan_key, tokens_key
from actstore.store.manifest import MANIFEST_KEY, Manifest, shards_key, statistics_key, update_manifest
from actstore.store.plan import Plan
from actstore.store.verification import Finding


def repair(blobs: Blobs, findings: Iterable[Finding], plans: Mapping[str, Plan]) -> list[str]:
    """Remove damaged objects, and every record that vouches for one of them. Nobody may write meanwhile.

    A damaged plan is written again from its copy in the manifest.

    Args:
        blobs: the store.
        findings: of `actstore.store.verify.Check`.
        plans: the plans that it could trust.

    Returns:
        Keys of the removed objects.

    Raises:
        StorageError: removing failed; repeat the repair.
    """
    damage = [f for f in findings if f.severity == "damage" and f.is_repairable]
    if not damage:
        return []
    removed: list[str] = []

    def remove(key: str) -> None:
        if key not in removed and blobs.head(key) is not None:
            blobs.delete(key)
            removed.append(key)

    # First what is trusted most: whoever is killed in between leaves a store that says less, never more.
    runs = {finding.run for finding in damage if finding.run is not None}
    if any(finding.key == MANIFEST_KEY for finding in damage):
        remove(MANIFEST_KEY)
    elif blobs.head(MANIFEST_KEY) is not None:
        update_manifest(blobs, lambda manifest: _without(manifest, runs))
    for run in sorted(runs):
        remove(shards_key(run))
        remove(statistics_key(run))
    for finding in damage:
        if finding.run is not None and finding.segment is not None:
            remove(commit_key(finding.run, finding.segment))
        if finding.run is not None and _is_token_shard(finding, plans):
            remove(tokens_key(finding.run))
    for finding in damage:
        remove(finding.key)
        plan = plans.get(finding.run or "")
        if plan is not None and finding.key == plan_key(plan.run):
            blobs.create(finding.key, [plan.to_bytes()])
    return removed


def _without(manifest: Manifest, runs: Iterable[str]) -> Manifest:
    gone = set(runs)
    kept = tuple(finished for finished in manifest.runs if finished.plan.run not in gone)
    return Manifest(sealed=False, runs=kept)


def _is_token_shard(finding: Finding, plans: Mapping[str, Plan]) -> bool:
    plan = plans.get(finding.run or "")
    return plan is not None and any(
        finding.key.startswith(f"{layout.path}/c.") for layout in plan.token_arrays()
    )

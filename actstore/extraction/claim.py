"""Claiming a place in a store: the plan first, then the Zarr metadata of what it will hold."""

from concurrent.futures import ThreadPoolExecutor
from typing import Final

from actstore.errors import PlanMismatchError, StorageError
from actstore.extraction.planning.differences import is_same
from actstore.storage.blobs import Blobs
from actstore.store.format.layout import ROOT_METADATA
from actstore.store.format.plan import FIRST_RUN, Plan
from actstore.store.records.commit import plan_key, read_plan
from actstore.store.records.seal import unseal
from actstore.store.records.zarr_documents import zarr_documents

_WRITERS: Final = 16


def claim(blobs: Blobs, plan: Plan) -> None:
    """Write the plan: whoever comes with another one is refused from here on. Then the Zarr metadata.

    What is there already is left alone, so it can be repeated.

    Raises:
        PlanMismatchError: another run has claimed the place since this one was planned.
        StorageError: another Zarr hierarchy is there.
    """
    if plan.run != FIRST_RUN:
        # Before the plan: from then on there is more than the manifest names.
        unseal(blobs)
    if not blobs.create(plan_key(plan.run), [plan.to_bytes()]):
        claimed = read_plan(blobs, plan.run)
        if claimed is None or not is_same(claimed, plan):
            raise PlanMismatchError(
                f"another run has just started a different plan at {blobs.url}; choose another out, or wait until it "
                "is complete"
            )
    if plan.run != FIRST_RUN:
        # Whoever finished an earlier run meanwhile may not have seen this one, and have sealed the store.
        unseal(blobs)
    documents = zarr_documents(plan)
    last = documents.pop(ROOT_METADATA)
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="metadata") as threads:
        list(threads.map(lambda item: _create(blobs, *item), documents.items()))
    _create(blobs, ROOT_METADATA, last)


def _create(blobs: Blobs, key: str, data: bytes) -> None:
    if not blobs.create(key, [data]) and bytes(blobs.read(key)) != data:
        raise StorageError(
            f"{blobs.url}/{key} is not what this plan would write; something else is at this place: choose another "
            "out"
        )

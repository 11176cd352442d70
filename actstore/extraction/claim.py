"""Claiming a place in a store: writing the plan first, then the Zarr metadata of its arrays."""

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
    """Write the plan, so that any other plan is refused from here on, and then the Zarr metadata.

    Files that exist already are left alone, so the call can be repeated.

    Raises:
        PlanMismatchError: another run claimed the place after this one was planned.
        StorageError: there is another Zarr hierarchy in the place.
    """
    if plan.run != FIRST_RUN:
        # Before the plan is written: the manifest does not name this run.
        unseal(blobs)
    if not blobs.create(plan_key(plan.run), [plan.to_bytes()]):
        claimed = read_plan(blobs, plan.run)
        if claimed is None or not is_same(claimed, plan):
            raise PlanMismatchError(
                f"another run has just started a different plan at {blobs.url}; choose another out, or wait until it "
                "is complete"
            )
    if plan.run != FIRST_RUN:
        # Another process may have finished an earlier run meanwhile, and sealed the store without seeing this one.
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

"""The ``zarr.json`` files of a store, which let any Zarr reader open it."""

from actstore.store.format.document import FORMAT
from actstore.store.format.layout import ROOT_METADATA, group_metadata, to_json
from actstore.store.format.plan import RUNS, Plan
from actstore.store.records.manifest import MANIFEST_KEY


def zarr_documents(plan: Plan) -> dict[str, bytes]:
    """The ``zarr.json`` of every group and array of a run, by key."""
    metadata = {layout.metadata_key: layout.metadata() for layout in plan.arrays()}
    metadata |= {f"{group}/zarr.json": group_metadata({}) for group in (*plan.groups, "acts", "_actstore")}
    summary = {"format": FORMAT, "manifest": MANIFEST_KEY, "runs": RUNS}
    metadata[ROOT_METADATA] = group_metadata({"actstore": summary})
    return {key: to_json(document) for key, document in metadata.items()}

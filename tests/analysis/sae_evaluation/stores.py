"""Small stores whose tokens are of documents."""

from pathlib import Path

import ml_dtypes  # noqa: F401 - makes bfloat16 a name of NumPy
import numpy as np
from numpy.typing import NDArray

import actstore
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import TokensRecord, plan_key, tokens_key
from actstore.store.records.zarr_documents import zarr_documents
from tests.analysis.stores import HOOK, plan_of
from tests.store.example import commit_segment, example_tokens, write_array


def store_of_documents(
    folder: Path, values: NDArray[np.float32], documents: NDArray[np.int64], dtype: str = "float32"
) -> Store:
    """A store of one hook with these values, [n_sequences, 8, 16], of tokens of these documents, [n_sequences, 8]."""
    plan, blobs = plan_of(len(values), dtype=dtype), LocalBlobs(folder)
    columns = {hook.name: np.zeros((len(values), 8, *hook.shape), dtype) for hook in plan.request.hooks} | {
        HOOK: values.astype(dtype)
    }
    tokens = {**example_tokens(plan), "documents": documents.astype("<i8")}
    blobs.create(plan_key(plan.run), [plan.to_bytes()])
    for key, data in zarr_documents(plan).items():
        blobs.create(key, [data])
    records = [
        record
        for layout in plan.token_arrays()
        for record in write_array(blobs, layout, tokens[layout.path], range(layout.n_shards))
    ]
    blobs.create(tokens_key(plan.run), [TokensRecord(shards=tuple(records)).to_bytes()])
    for index in range(plan.n_segments):
        commit_segment(blobs, plan, index, columns)
    return actstore.open(blobs.url)

"""Rows of features as an Arrow table and as Parquet."""

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.analysis.top.contexts import TokenTexts, check_window, windows
from actstore.analysis.top.found import FoundRows
from actstore.errors import StorageError
from actstore.reason import reason


def table_of(top: FoundRows, before: int, after: int, text: bool) -> pa.Table:
    """See `TopActivations.to_arrow`."""
    check_window(before, after)
    texts = TokenTexts(top.store) if text else None
    feature, rank = np.nonzero(top.sequences >= 0)
    at = (feature, rank)
    ids: list[list[int]] = [[] for _ in feature]
    places = np.zeros(len(feature), np.int32)
    for row, around, place in windows(top.store, top.sequences[at], top.positions[at], before, after):
        ids[row], places[row] = around, place
    documents = top.documents[at]
    columns = {
        "feature": pa.array(feature.astype(np.int32)),
        "rank": pa.array(rank.astype(np.int32)),
        "value": pa.array(top.values[at]),
        "sequence": pa.array(top.sequences[at]),
        "position": pa.array(top.positions[at].astype(np.int32)),
        "document": pa.array(documents, mask=documents < 0),
        "token_id": pa.array(
            [some[place] for some, place in zip(ids, places.tolist(), strict=True)], pa.int32()
        ),
        "context_ids": pa.array(ids, pa.list_(pa.int32())),
        "at": pa.array(places),
    }
    if top.quantiles is not None:
        columns["quantile"] = pa.array(top.quantiles[at].astype(np.int32))
    if texts is not None:
        contexts = [[texts[token] for token in some] for some in ids]
        columns["token"] = pa.array(
            [some[place] for some, place in zip(contexts, places.tolist(), strict=True)], pa.string()
        )
        columns["context"] = pa.array(contexts, pa.list_(pa.string()))
    about = {"actstore.hook": top.hook, "actstore.store": top.store.url, "actstore.n_rows": str(top.n_rows)}
    return pa.table(columns, metadata=about)


def write(table: pa.Table, path: Path) -> None:
    """Write a table to a Parquet file, which is whole or not there.

    Raises:
        StorageError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        pq.write_table(table, partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {reason(error)}") from error

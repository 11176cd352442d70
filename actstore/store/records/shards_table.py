"""The table of all shards of a run, as a Parquet file."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import StorageError
from actstore.reason import reason
from actstore.store.format.plan import Plan
from actstore.store.records.commit import ObjectRecord, TokensRecord, columns_folder

_FIELDS: Final[Any] = [
    ("array", pa.string()),
    ("shard", pa.int32()),
    ("key", pa.string()),
    ("nbytes", pa.int64()),
    ("crc32c", pa.uint32()),
]
SHARDS_SCHEMA: Final = pa.schema(_FIELDS)
"""The columns of ``shards.parquet``."""

_ROW_NBYTES: Final = 1024
_MAX_TABLES: Final = 1 << 16
"""Tables of kept columns of a run at most: of 64 MiB each, they have 4 TiB."""
_SLACK_NBYTES: Final = 1 << 20
"""Bytes that a file may have beyond the expected data: more than a row, whose key has some 300 bytes, and all of the
metadata.
"""


def shards_table(
    plan: Plan, shards: Mapping[int, Sequence[ObjectRecord]], tokens: TokensRecord | None
) -> pa.Table:
    """The table of every shard of a run: token arrays first, then hooks, then norms, then the tables of kept columns,
    each ordered by number.

    Args:
        plan: the plan of the run.
        shards: the records of each segment, in the order of `Plan.segment_arrays`.
        tokens: the record of the tokens, for a run that brings tokens.
    """
    rows: list[tuple[str, int, ObjectRecord]] = []
    if tokens is not None:
        places = [(layout.path, i) for layout in plan.token_arrays() for i in range(layout.n_shards)]
        if len(places) != len(tokens.shards):
            raise StorageError(
                f"the record of the tokens of run {plan.run} names {len(tokens.shards)} shards where "
                f"{len(places)} were expected; it is damaged"
            )
        rows += [(path, i, shard) for (path, i), shard in zip(places, tokens.shards, strict=True)]
    for number, layout in enumerate(plan.segment_arrays()):
        rows += [(layout.path, index, shards[index][number]) for index in sorted(shards)]
    if tokens is not None:
        rows += [(columns_folder(plan.run), i, table) for i, table in enumerate(tokens.tables)]
    columns = {
        "array": [path for path, _, _ in rows],
        "shard": [index for _, index, _ in rows],
        "key": [shard.key for _, _, shard in rows],
        "nbytes": [shard.nbytes for _, _, shard in rows],
        "crc32c": [shard.crc32c for _, _, shard in rows],
    }
    return pa.table(columns, schema=SHARDS_SCHEMA)


def to_parquet(table: pa.Table) -> bytes:
    """Write a table as Parquet. With one version of pyarrow, equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue().to_pybytes()


def of_plan(data: bytes, plan: Plan) -> pa.Table:
    """Read the table of a finished run. How many tables of kept columns it has, the plan does not say.

    Raises:
        StorageError: the file is not such a table.
    """
    n_shards = sum(layout.n_shards for layout in plan.arrays())
    has_tables = plan.has_own_tokens and plan.request.tokens.keep
    return from_parquet(data, n_rows=n_shards, n_more=_MAX_TABLES if has_tables else 0)


def from_parquet(data: bytes, *, n_rows: int, n_more: int = 0) -> pa.Table:
    """Read a table with so many rows. Nothing is unpacked if the file claims to hold more.

    Args:
        data: bytes of the file.
        n_rows: rows that it has at least.
        n_more: rows that it may have beside them.

    Raises:
        StorageError: the file is not such a table.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        n_there = file.metadata.num_rows
        if n_rows <= n_there <= n_rows + n_more and _is_expected(file, n_there):
            # Threads gain nothing for five small columns, and a pyarrow thread that ends while tracemalloc is being
            # stopped crashes Python 3.11.
            return file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"table of shards cannot be read as Parquet: {reason(error)}") from error
    raise StorageError(f"table of shards has not the columns and the {n_rows} rows that were expected")


def _is_expected(file: Any, n_rows: int) -> bool:
    """Whether a file has the expected columns and rows, according to all of its metadata."""
    metadata = file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    return bool(
        metadata.num_rows == n_rows
        and sum(group.num_rows for group in groups) == n_rows
        and sum(chunk.num_values for chunk in chunks) == n_rows * len(SHARDS_SCHEMA)
        and sum(chunk.total_uncompressed_size for chunk in chunks) <= _SLACK_NBYTES + n_rows * _ROW_NBYTES
        and file.schema_arrow.equals(SHARDS_SCHEMA)
    )


def is_table(data: bytes, table: pa.Table) -> bool:
    """Whether a file holds this table, whichever version of pyarrow wrote it."""
    try:
        return bool(table.equals(from_parquet(data, n_rows=table.num_rows)))
    except StorageError:
        return False

"""The bytes of a table of kept columns: a Parquet file whose bytes follow from its rows."""

from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import StorageError
from actstore.reason import reason

MAX_ROWS: Final = 1 << 20
"""Rows of a table at most."""
_MAX_UNPACKED: Final = 512 << 20
"""Bytes of the unpacked pages of a table at most, far above the 128 MiB that a writer puts into one."""
_DICTIONARIES: Final = frozenset({"PLAIN_DICTIONARY", "RLE_DICTIONARY"})


def encode_table(table: pa.Table) -> bytes:
    """Write a table as Parquet. With one version of pyarrow, equal tables give equal bytes.

    There are no dictionaries, in which a small file can stand for any amount of memory, and no statistics.

    Raises:
        StorageError: Parquet has no such type.
    """
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(
            table.combine_chunks(),  # pages end where chunks do
            sink,
            row_group_size=MAX_ROWS,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            write_statistics=False,
            store_schema=True,
        )
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"columns {', '.join(table.schema.names)}: {reason(error)}") from error
    return sink.getvalue().to_pybytes()


def decode_table(data: Any, names: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Read some columns of a table.

    Args:
        data: bytes of the file.
        names: columns that the plan keeps, in order.
        columns: columns to read; None for all.

    Raises:
        StorageError: the file is not such a table.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(data)))
        problem = _problem(file, names)
        if problem is None:
            # As for the table of shards: a thread of pyarrow that ends at a bad moment crashes Python 3.11.
            wanted = None if columns is None else list(columns)
            return file.read(columns=wanted, use_threads=False).replace_schema_metadata(None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"it cannot be read as Parquet: {reason(error)}") from error
    raise StorageError(problem)


def _problem(file: Any, names: Sequence[str]) -> str | None:
    """How the metadata of a file contradict what a writer makes; None if they do not."""
    metadata = file.metadata
    if tuple(file.schema_arrow.names) != tuple(names):
        return "it does not have the columns that the plan keeps"
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if metadata.num_rows > MAX_ROWS or sum(group.num_rows for group in groups) != metadata.num_rows:
        return f"it has not the {metadata.num_rows} rows that it announces, or more than {MAX_ROWS}"
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    if sum(chunk.total_uncompressed_size for chunk in chunks) > _MAX_UNPACKED:
        return f"it unpacks to more than {_MAX_UNPACKED} bytes"
    if any(_DICTIONARIES & set(chunk.encodings) for chunk in chunks):
        return "it has dictionaries, which a writer does not use"
    return None


def is_table(data: Any, own: bytes, names: Sequence[str]) -> bool:
    """Whether a file holds the rows of `own`, whichever version of pyarrow wrote it.

    The bytes are compared that this version gives to what it reads: values may be NaN, which equals nothing.
    """
    try:
        there, here = (encode_table(decode_table(file, names)) for file in (data, own))
        return there == here
    except StorageError:
        return False

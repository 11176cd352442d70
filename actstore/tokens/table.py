"""Columns of Parquet and Arrow IPC files (both the file and the stream format), in bounded memory."""

from collections.abc import Iterator, Sequence
from io import IOBase
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import TokensError
from actstore.tokens.batch import TextBatch, TokenBatch, in_batches
from actstore.tokens.chats.chat import ChatBatch
from actstore.tokens.column import Kind, choose_field, chunk_chats, chunk_texts, chunk_tokens
from actstore.tokens.failure import reading
from actstore.tokens.files import LocatedFile
from actstore.tokens.keeping.plain_type import check_same_types, kept_types
from actstore.tokens.keeping.row_taker import RowTaker

_ROWS = 1024
_MAX_NBYTES = 256 << 20
"""The approximate number of bytes of a column that are in memory at once."""
_SUSPICIOUS_NBYTES = 1 << 30
_MAX_RATIO = 10_000
_ID_NBYTES = 8
_FILE_MAGIC = b"ARROW1"


class TableSource:
    """The values of one column as documents: strings, lists of token ids, or chats. A null is an empty document."""

    kind: Kind
    column: str

    def __init__(self, files: tuple[LocatedFile, ...], column: str | None, keep: Sequence[str] = ()) -> None:
        """Open the source. Raises TokensError if the first file cannot be read or lacks a column."""
        self.files = tuple(file.public for file in files)
        self.keep = tuple(keep)
        self._located = files
        schema = _schema(files[0])
        self.column, self.kind = choose_field(schema, column, files[0].name)
        self._types = kept_types(self.keep, schema, files[0].name)

    def batches(
        self, kept: RowTaker | None = None
    ) -> Iterator[TextBatch] | Iterator[TokenBatch] | Iterator[ChatBatch]:
        """Yield batches of documents. Raises TokensError for a later file that cannot be read or lacks a column, or has
        one of another type.
        """
        if self.kind == "text":
            return in_batches(
                text
                for file in self._located
                for _, chunk in self._chunks(file, kept)
                for text in chunk_texts(chunk, file.name)
            )
        if self.kind == "chats":
            return in_batches(
                chat
                for file in self._located
                for row, chunk in self._chunks(file, kept)
                for chat in chunk_chats(chunk, file.name, row)
            )
        return in_batches(
            ids
            for file in self._located
            for row, chunk in self._chunks(file, kept)
            for ids in chunk_tokens(chunk, file.name, row)
        )

    def _chunks(self, file: LocatedFile, kept: RowTaker | None) -> "Iterator[tuple[int, pa.Array[Any]]]":
        """The number of the first row of each chunk, and the chunk."""
        schema = _schema(file)
        _, kind = choose_field(schema, self.column, file.name)
        if kind != self.kind:
            raise TokensError(
                f"column {self.column} holds {self.kind} in {self.files[0].url} but {kind} in {file.name}; "
                "read them as two sources"
            )
        columns = [self.column]
        if kept is not None:
            types = kept_types(self.keep, schema, file.name)
            check_same_types(self._types, types, self.files[0].url, file.name)
            columns += [name for name in self.keep if name != self.column]
        row = 0
        with reading(file.name), file.open() as stream:
            batches = (
                _parquet(stream, columns, file.name) if file.format == "parquet" else _arrow(stream, columns)
            )
            for batch in batches:
                if kept is not None:
                    kept.add_rows(batch)
                yield row, batch.column(self.column)
                row += batch.num_rows


def _schema(file: LocatedFile) -> pa.Schema:
    with reading(file.name), file.open() as stream:
        return pq.read_schema(stream) if file.format == "parquet" else _reader(stream, None).schema


def _parquet(stream: BinaryIO, columns: Sequence[str], name: str) -> Iterator[pa.RecordBatch]:
    table = pq.ParquetFile(stream)
    for group in range(table.num_row_groups):
        n_rows = min(_rows_at_once(table.metadata.row_group(group), column, name) for column in columns)
        yield from table.iter_batches(batch_size=n_rows, row_groups=[group], columns=list(columns))


def _rows_at_once(group: pq.RowGroupMetaData, column: str, name: str) -> int:
    """How many rows of a row group to hold in memory at once, so that they take about `_MAX_NBYTES`.

    In a dictionary-encoded column one value can stand for many rows in little space. Raises TokensError for a column
    that unpacks to far more than any text does.
    """
    nbytes = n_compressed = n_values = 0
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema.split(".")[0] == column:
            nbytes += chunk.total_uncompressed_size
            n_compressed += chunk.total_compressed_size
            n_values += chunk.num_values
    unpacked = max(nbytes, n_values * _ID_NBYTES)
    if unpacked > _SUSPICIOUS_NBYTES and unpacked > _MAX_RATIO * n_compressed:
        raise TokensError(
            f"column {column} of {name} unpacks from {n_compressed:,} bytes to {unpacked:,}, more than "
            f"{_MAX_RATIO:,} times as many, which no text does; write the file again"
        )
    n_ids_per_row = n_values // max(1, group.num_rows)
    # A value is at most as long as the row group's values together, but each row may have it.
    most = max(1, n_ids_per_row * _ID_NBYTES if n_values > group.num_rows else nbytes)
    return max(1, min(_ROWS, _MAX_NBYTES // most))


def _arrow(stream: BinaryIO, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    schema = _reader(stream, None).schema
    fields = [schema.get_field_index(column) for column in columns]
    stream.seek(0)
    reader = _reader(stream, pa.ipc.IpcReadOptions(included_fields=fields))
    for batch in _record_batches(reader):
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


def _record_batches(
    reader: pa.RecordBatchFileReader | pa.RecordBatchStreamReader,
) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        return map(reader.get_batch, range(reader.num_record_batches))
    return reader


def _reader(
    stream: BinaryIO, options: pa.ipc.IpcReadOptions | None
) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    # `datasets` writes the stream format, Feather is the file format, and both use the suffix .arrow.
    magic = stream.read(len(_FILE_MAGIC))
    stream.seek(0)
    opener = pa.ipc.open_file if magic == _FILE_MAGIC else pa.ipc.open_stream
    return opener(cast(IOBase, stream), options=options)

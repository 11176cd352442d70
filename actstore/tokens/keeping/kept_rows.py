"""Kept columns on their way from a source to a store: a file of Arrow pieces, so that memory is bounded."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from actstore.errors import StorageError, TokensError
from actstore.reason import reason
from actstore.tokens.keeping.json_type import JsonType
from actstore.tokens.keeping.plain_type import plain_type

TABLE_ROWS: Final = 1 << 20
"""Rows of a table at most."""
TABLE_NBYTES: Final = 64 << 20
"""Bytes of a table, from which on the next one begins; the last piece can make it twice as large."""
_PENDING_ROWS: Final = 1024
_PENDING_NBYTES: Final = 4 << 20
"""Records that are made into Arrow together."""


class KeptRows:
    """Takes the rows of a source in order, and gives them back in tables of bounded size.

    A source may be ahead of those who use its documents: `finish` says how many rows count.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """
        Args:
            names: columns, in order.
            folder: folder for the file, which must not be removed before `finish`.
        """
        self.names = tuple(names)
        self._path = folder / "kept.arrow"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("wb")
        weakref.finalize(self, self._file.close)
        self._pieces: list[int] = [0]
        """Where each piece ends in the file."""
        self._types: dict[str, pa.DataType] = dict.fromkeys(self.names, pa.null())
        self._json = {name: JsonType() for name in self.names}
        self._pending: list[tuple[Any, ...]] = []
        self._pending_nbytes = 0
        self._n_rows = 0
        self._map: pa.Buffer | None = None

    def add_record(self, record: Mapping[str, Any], where: str) -> None:
        """Take a record of JSON; a key that it lacks is null.

        Args:
            record: record of the source.
            where: its place, such as ``line 3 of text.jsonl``.

        Raises:
            StorageError: the file cannot be written.
            TokensError: a value cannot be kept, or is of another type than those before.
        """
        values = tuple(record.get(name) for name in self.names)
        for name, value in zip(self.names, values, strict=True):
            self._pending_nbytes += self._json[name].see(value, f"{name} in {where}")
        self._pending.append(values)
        if len(self._pending) == _PENDING_ROWS or self._pending_nbytes >= _PENDING_NBYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        columns = list(zip(*self._pending, strict=True))
        self._pending, self._pending_nbytes = [], 0
        self.add_rows(
            pa.record_batch(
                [
                    _converted(name, list(values), self._json[name].arrow())
                    for name, values in zip(self.names, columns, strict=True)
                ],
                names=list(self.names),
            )
        )

    def add_rows(self, rows: pa.RecordBatch) -> None:
        """Take rows that are Arrow already.

        Args:
            rows: the columns of `names`, of one type each from the first row to the last; null until the type is known.

        Raises:
            StorageError: the file cannot be written.
            TokensError: a row is too large.
        """
        rows = _plain(rows, self.names)
        for field in rows.schema:
            if not pa.types.is_null(field.type):
                self._types[field.name] = field.type
        try:
            for piece in _cut(rows):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, piece.schema) as writer:
                    writer.write_batch(piece)
                data = sink.getvalue()
                self._file.write(data)
                self._pieces.append(self._pieces[-1] + data.size)
        except OSError as error:
            raise StorageError(
                f"the kept columns cannot be written to {self._path.parent}: {reason(error)}"
            ) from error

    def finish(self, n_rows: int) -> None:
        """Take no more rows; the first ``n_rows`` are those of documents that were used."""
        self._flush()
        self._file.close()
        self._n_rows = n_rows
        # The mapped file lives on after it is unlinked.
        self._map = pa.memory_map(str(self._path)).read_buffer() if self._pieces[-1] else pa.py_buffer(b"")

    @property
    def nbytes(self) -> int:
        """About how many bytes the tables take at most."""
        return self._pieces[-1]

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns, once all rows were taken."""
        return pa.schema([(name, self._types[name]) for name in self.names])

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order, in tables of at most `TABLE_ROWS` rows and about `TABLE_NBYTES` bytes; at least one.

        Raises:
            TokensError: a column has whole numbers that float64 cannot hold, and numbers with fractions.
        """
        batches: list[pa.RecordBatch] = []
        n_rows = nbytes = 0
        for piece in self._rows():
            rest = piece
            while rest.num_rows:
                if n_rows == TABLE_ROWS or nbytes >= TABLE_NBYTES:
                    yield pa.Table.from_batches(batches)
                    batches, n_rows, nbytes = [], 0, 0
                taken = rest.slice(0, TABLE_ROWS - n_rows)
                batches.append(taken)
                n_rows, nbytes = n_rows + taken.num_rows, nbytes + taken.nbytes
                rest = rest.slice(taken.num_rows)
        yield pa.Table.from_batches(batches, schema=self.schema)

    def _rows(self) -> Iterator[pa.RecordBatch]:
        assert self._map is not None
        schema, left = self.schema, self._n_rows
        for start, stop in zip(self._pieces, self._pieces[1:], strict=False):
            if not left:
                return
            with pa.ipc.open_stream(self._map.slice(start, stop - start)) as reader:
                piece = reader.read_next_batch().slice(0, left)
            left -= piece.num_rows
            if piece.schema != schema:
                columns = [
                    column
                    if column.type == field.type
                    else _converted(field.name, column.to_pylist(), field.type)
                    for column, field in zip(piece.columns, schema, strict=True)
                ]
                piece = pa.record_batch(columns, schema=schema)
            yield piece


def _converted(name: str, values: list[Any], to: pa.DataType) -> "pa.Array[Any]":
    """
    Raises:
        TokensError: a whole number is too large for the type.
    """
    try:
        return pa.array(values, type=to)
    except pa.ArrowException as error:
        raise TokensError(
            f"column {name} cannot be kept as {to}, the one type that fits all its values: {reason(error)}; mend the "
            "source, or leave the column out"
        ) from error


def _plain(rows: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
    """The same rows without metadata, and without encodings: those may differ from file to file."""
    columns = []
    for name in names:
        column: pa.Array[Any] = rows.column(name)
        plain = plain_type(column.type)
        columns.append(column if column.type == plain else column.cast(plain))
    return pa.record_batch(columns, names=list(names))


def _cut(rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Pieces of at most `TABLE_NBYTES`.

    Raises:
        TokensError: a single row is larger.
    """
    if rows.nbytes <= TABLE_NBYTES:
        yield rows
        return
    if rows.num_rows == 1:
        raise TokensError(
            f"the columns {', '.join(rows.schema.names)} have {rows.nbytes:,} bytes in one row, and {TABLE_NBYTES:,} "
            "are the most that can be kept of a document; leave the largest column out"
        )
    half = rows.num_rows // 2
    yield from _cut(rows.slice(0, half))
    yield from _cut(rows.slice(half))

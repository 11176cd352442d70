"""The kept columns of a store, such as labels: one row for each document, read when they are first used."""

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import NotCommittedError, StorageError, TokensError
from actstore.storage.blobs import BlobReader, Bytes
from actstore.store.records.commit import ObjectRecord, TokensRecord, columns_key, tokens_key
from actstore.store.records.run import Run, runs_with_tokens

if TYPE_CHECKING:
    import pyarrow as pa

MAX_TABLE_NBYTES: Final = 192 << 20
"""Bytes of a table at most. Writers put 128 MiB into one at most."""


class KeptColumns:
    """Columns of the source that were kept beside the tokens. Threads may share one.

    Rows are numbered through: first those of the first part that keeps columns, one for each of its documents from
    document 0 on, then those of the next one.
    """

    def __init__(self, blobs: BlobReader, runs: Sequence[Run]) -> None:
        """
        Args:
            blobs: storage of the store.
            runs: its runs.
        """
        self._blobs = blobs
        self._parts = runs_with_tokens(runs)
        self._lock = threading.Lock()
        self._read: dict[tuple[str, str], pa.ChunkedArray[Any]] = {}
        """Columns that were read, by run and name."""
        self._counts: dict[str, int] = {}
        """Rows of parts of which something was read, by run."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of all parts, in the order of the first part that has them."""
        return tuple(dict.fromkeys(name for part in self._parts for name in _keep(part)))

    def columns(self, names: Iterable[str] | None = None) -> "dict[str, pa.ChunkedArray[Any]]":
        """Columns by name, with one value for each row; a part that does not keep a column has nulls there.

        Args:
            names: columns to read; None for all. What was read before is not read again.

        Raises:
            NotCommittedError: the tokens of a part are not committed.
            StorageError: a table is damaged or cannot be read.
            TokensError: the store has no such column.
        """
        wanted = self.names if names is None else tuple(names)
        for name in wanted:
            if name not in self.names:
                there = ", ".join(self.names) or "none; name them as keep (--keep) when you extract"
                raise TokensError(f"{self._blobs.url} keeps no column {name}; its columns are: {there}")
        if not wanted:
            raise TokensError(
                f"{self._blobs.url} keeps no columns of its source; name them as keep (--keep) when you extract"
            )
        with self._lock:
            for part in self._parts:
                self._need(part, wanted)
            return {name: self._joined(name) for name in wanted}

    def rows_of(self, documents: NDArray[np.int64], sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of documents, of the shape of `documents`: -1 for tokens that packing put in, and in parts that keep
        no columns.

        Args:
            documents: numbers of documents as stored, [n_sequences, ...].
            sequences: sequences that they are of, [n_sequences].

        Raises:
            NotCommittedError, StorageError: as for `columns`.
        """
        rows = np.full(documents.shape, -1, np.int64)
        first_sequence = first_row = 0
        for part in self._parts:
            stop = first_sequence + part.plan.n_sequences
            n_rows = self._n_rows(part)
            (here,) = np.nonzero((sequences >= first_sequence) & (sequences < stop))
            if len(here) and _keep(part):
                numbers = documents[here]
                if numbers.size and numbers.max() >= n_rows:
                    raise _damaged(
                        self._blobs,
                        tokens_key(part.plan.run),
                        f"its tables have {n_rows} rows, and there is a document {numbers.max()}",
                    )
                rows[here] = np.where(numbers < 0, -1, numbers + first_row)
            first_sequence, first_row = stop, first_row + n_rows
        return rows

    def _n_rows(self, part: Run) -> int:
        """Rows of a part, 0 if it keeps no columns."""
        with self._lock:
            self._need(part, ())
            return self._counts.get(part.plan.run, 0)

    def _need(self, part: Run, names: Sequence[str]) -> None:
        """Read columns of a part, each of its tables once."""
        run, keep = part.plan.run, _keep(part)
        missing = [name for name in names if name in keep and (run, name) not in self._read]
        if keep and not missing and run not in self._counts:
            missing = [keep[0]]
        if not missing:
            return
        import pyarrow as pa

        from actstore.store.format.kept_table import decode_table

        tables: list[pa.Table] = []
        for record in self._records(part):
            try:
                table = decode_table(read_table(self._blobs, record), keep, missing)
            except StorageError as error:
                raise _damaged(self._blobs, record.key, str(error)) from error
            if tables and table.schema != tables[0].schema:
                raise _damaged(
                    self._blobs, record.key, "its columns are not of the types of the tables before"
                )
            tables.append(table)
        joined = pa.concat_tables(tables)
        self._read |= {(run, name): joined.column(name) for name in missing}
        self._counts[run] = joined.num_rows

    def _records(self, part: Run) -> tuple[ObjectRecord, ...]:
        run = part.plan.run
        if not part.has_tokens:
            raise NotCommittedError(
                f"the columns that run {run} keeps are not committed in {self._blobs.url}; run the extraction again "
                "to complete them"
            )
        tables = TokensRecord.read(self._blobs, tokens_key(run)).tables
        if not tables or any(table.key != columns_key(run, number) for number, table in enumerate(tables)):
            raise _damaged(
                self._blobs, tokens_key(run), "it does not name the tables of the kept columns in order"
            )
        return tables

    def _joined(self, name: str) -> "pa.ChunkedArray[Any]":
        """A column of all parts, whose tables were read."""
        import pyarrow as pa

        parts = [part for part in self._parts if _keep(part)]
        there = {part.plan.run: self._read[part.plan.run, name] for part in parts if name in _keep(part)}
        types = [(run, column.type) for run, column in there.items() if not pa.types.is_null(column.type)]
        first, type_ = types[0] if types else ("", pa.null())
        for run, other in types:
            if other != type_:
                raise StorageError(
                    f"column {name} of {self._blobs.url} is {type_} in run {first} and {other} in run {run}, which no "
                    "writer of this version does"
                )
        chunks: list[Any] = []
        for part in parts:
            run = part.plan.run
            column = there.get(run)
            if column is None or pa.types.is_null(column.type):
                chunks.append(pa.nulls(self._counts[run], type_))
            else:
                chunks += column.chunks
        return pa.chunked_array(chunks, type_)


def _keep(part: Run) -> tuple[str, ...]:
    return part.plan.request.tokens.keep


def read_table(blobs: BlobReader, record: ObjectRecord) -> Bytes:
    """The bytes of a table, compared with its record.

    Raises:
        StorageError: they are others, or cannot be read.
    """
    if record.nbytes > MAX_TABLE_NBYTES:
        raise _damaged(
            blobs, record.key, f"it has {record.nbytes} bytes, and {MAX_TABLE_NBYTES} are the most"
        )
    data = blobs.read(record.key, 0, record.nbytes)
    if not record.is_of(data):
        raise _damaged(blobs, record.key, "it is not what was committed")
    return data


def _damaged(blobs: BlobReader, key: str, problem: str) -> StorageError:
    return StorageError(f"{blobs.url}/{key} is damaged: {problem}; run `actstore verify {blobs.url}`")

"""Tables and data sets in memory: pandas, polars, Arrow, and those of Hugging Face.

None of these libraries is imported here: a table is known by the module that its type comes from.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from actstore.errors import TokensError
from actstore.reason import reason
from actstore.tokens.column import choose_column, chunk_chats, chunk_texts, chunk_tokens, kind_of_type
from actstore.tokens.keeping.row_taker import RowTaker
from actstore.tokens.memory.array import without_padding
from actstore.tokens.memory.items import Document

MASK: Final = "attention_mask"
"""The column that says which ids of a row are padding."""
_ROWS: Final = 4096
_PEEKED: Final = 1000

Chunks = Callable[[str], "Iterator[pa.Array[Any]]"]
"""Takes the name of a column and gives its rows in chunks."""


def library_of(given: Any) -> str:
    """The library that an object is of, such as ``pandas``; the class may be a subclass made by the user."""
    homes = [kind.__module__.partition(".")[0] for kind in type(given).__mro__]
    return next((home for home in homes if home in _READERS), "")


def is_table(given: Any) -> bool:
    """Whether this is a table, a column of one, or a data set that can be read again."""
    library = library_of(given)
    return bool(library) and (library != "datasets" or isinstance(given, dict) or _has_rows(given))


def is_stream(given: Any) -> bool:
    """Whether this is a data set that is read from its beginning to its end."""
    return library_of(given) == "datasets" and hasattr(given, "select_columns") and not _has_rows(given)


def _has_rows(given: Any) -> bool:
    return hasattr(given, "select_columns") and hasattr(given, "__len__")


class Table:
    """The documents of one column, which can be read again and again."""

    def __init__(self, given: Any, column: str | None) -> None:
        """Choose the column. Raises TokensError that lists the columns if it is not there."""
        self.name = f"the {library_of(given)} {type(given).__name__}"
        self._kinds, self._chunks = _READERS[library_of(given)](given, self.name)
        types = {name: str(type_) for name, type_ in self._kinds.items()}
        kinds = {name: kind_of_type(type_) for name, type_ in self._kinds.items()}
        if list(self._kinds) == [""]:  # a single column that has no name
            column = ""
        self.column, self.kind = choose_column(kinds, column, self.name, types=types)
        self._has_mask = self.kind == "tokens" and MASK in self._kinds

    def __iter__(self) -> Iterator[Document]:
        if self.kind == "text":
            yield from (text for chunk in self._of(self.column) for text in chunk_texts(chunk, self.name))
            return
        row = 0
        if self.kind == "chats":
            for chunk in self._of(self.column):
                yield from chunk_chats(chunk, self.name, row)
                row += len(chunk)
            return
        masks = (mask for chunk in self._of(MASK) for mask in _lists(chunk)) if self._has_mask else None
        for chunk in self._of(self.column):
            for ids in chunk_tokens(chunk, self.name, row):
                mask = None if masks is None else next(masks)
                yield ids if mask is None else without_padding(ids, mask, f"row {row} of {self.name}")
                row += 1

    def check_columns(self, names: Sequence[str]) -> None:
        """Raises TokensError that lists the columns if one is not there."""
        for name in names:
            if name not in self._kinds:
                raise TokensError(
                    f"{self.name} has no column {name}; its columns are: {', '.join(self._kinds)}"
                )

    def keeping(self, names: Sequence[str], kept: RowTaker) -> Iterator[Document]:
        """The documents; `kept` gets the columns of these names of each row before its document is yielded."""
        rows, n_rows = self._rows(names), 0
        for number, document in enumerate(self):
            if number == n_rows:
                batch = next(rows)
                kept.add_rows(batch)
                n_rows += batch.num_rows
            yield document

    def values(self, names: Sequence[str]) -> Iterator[Any]:
        """The values of some columns, row by row, as Python has them."""
        for batch in self._rows(names):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def _rows(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of some columns. Libraries cut columns into chunks in their own ways, so these are cut again."""
        chunks = [self._chunks(name) for name in names]
        left: list[pa.Array[Any] | None] = [None] * len(names)
        while True:
            for place, its_chunks in enumerate(chunks):
                chunk = left[place]
                while chunk is None or not len(chunk):
                    chunk = next(its_chunks, None)
                    if chunk is None:
                        return
                left[place] = chunk
            arrays = [chunk for chunk in left if chunk is not None]
            size = min(map(len, arrays))
            yield pa.record_batch([array.slice(0, size) for array in arrays], names=list(names))
            left = [array.slice(size) for array in arrays]

    def _of(self, column: str) -> "Iterator[pa.Array[Any]]":
        wanted = kind_of_type(self._kinds[column])
        for chunk in self._chunks(column):
            kind = kind_of_type(chunk.type)
            if kind != wanted and not pa.types.is_null(chunk.type):
                raise TokensError(
                    f"column {column} of {self.name} holds {chunk.type} where the rows before hold "
                    f"{self._kinds[column]}; give values of one type"
                )
            nulls: Any = pa.nulls
            yield chunk if kind == wanted else nulls(len(chunk), self._kinds[column])


def _lists(chunk: "pa.Array[Any]") -> "Iterator[np.ndarray[Any, Any] | None]":
    return (None if value is None else np.array(value) for value in chunk.to_pylist())


def _arrow(given: Any, name: str) -> "tuple[dict[str, pa.DataType], Chunks]":
    if not isinstance(given, pa.Table | pa.RecordBatch):
        column = given if isinstance(given, pa.ChunkedArray) else pa.chunked_array([given])
        return {"": column.type}, lambda _: _slices(column)
    table = given if isinstance(given, pa.Table) else pa.Table.from_batches([given])
    _check_once(table.column_names, name)
    return {field.name: field.type for field in table.schema}, lambda column: _slices(table.column(column))


def _slices(column: "pa.ChunkedArray[Any]") -> "Iterator[pa.Array[Any]]":
    for chunk in column.chunks:
        for start in range(0, len(chunk), _ROWS):
            yield chunk.slice(start, _ROWS)


def _polars(given: Any, name: str) -> "tuple[dict[str, pa.DataType], Chunks]":
    if hasattr(given, "collect"):
        raise TokensError(f"{name} is not computed yet; give its collect()")
    is_series = not hasattr(given, "columns")

    def chunks(column: str) -> "Iterator[pa.Array[Any]]":
        series = given if is_series else given.get_column(column)
        return (series.slice(start, _ROWS).to_arrow() for start in range(0, len(series), _ROWS))

    if is_series:
        return {"": given.head(0).to_arrow().type}, chunks
    return {field.name: field.type for field in given.head(0).to_arrow().schema}, chunks


def _pandas(given: Any, name: str) -> "tuple[dict[str, pa.DataType], Chunks]":
    columns = {"": given} if not hasattr(given, "columns") else {}
    if not columns:
        _check_once([str(column) for column in given.columns], name)
        columns = {str(column): given[column] for column in given.columns}

    def chunks(column: str) -> "Iterator[pa.Array[Any]]":
        series = columns[column]
        return (
            _array(series.iloc[start : start + _ROWS], column, name) for start in range(0, len(series), _ROWS)
        )

    return {column: _peeked_type(series) for column, series in columns.items()}, chunks


def _array(series: Any, column: str, name: str) -> "pa.Array[Any]":
    try:
        array = pa.array(series, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise TokensError(
            f"column {column} of {name} has values of several types: {reason(error)}"
        ) from error
    return array if isinstance(array, pa.Array) else array.combine_chunks()


def _peeked_type(series: Any) -> pa.DataType:
    """The type of the first values that are there; null if they have none in common."""
    try:
        values: pa.Array[Any] = pa.array(series.dropna().head(_PEEKED), from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError):
        return pa.null()
    type_: pa.DataType = values.type
    return type_


def _dataset(given: Any, name: str) -> "tuple[dict[str, pa.DataType], Chunks]":
    if isinstance(given, dict):
        raise TokensError(
            f"{name} holds the splits {', '.join(given)}; give one of them, such as data['train']"
        )
    schema = given.features.arrow_schema

    def chunks(column: str) -> "Iterator[pa.Array[Any]]":
        tables = given.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS)
        return (chunk for table in tables for chunk in table.column(column).chunks)

    return {field.name: field.type for field in schema}, chunks


def _check_once(columns: Iterable[str], name: str) -> None:
    names = list(columns)
    twice = next((column for column in names if names.count(column) > 1), None)
    if twice is not None:
        raise TokensError(f"{name} has several columns named {twice}; give each a name of its own")


_READERS: Final = {"pyarrow": _arrow, "polars": _polars, "pandas": _pandas, "datasets": _dataset}

"""Choosing the column that holds documents, and reading a chunk of that Arrow column."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.tokens.batch import MAX_DOCUMENT_NBYTES, TokenIds
from actstore.tokens.chats.chat import Chat, chat_of

Kind = Literal["text", "tokens", "chats"]
"""The kind of documents: strings, token ids, or lists of messages."""

# In order of preference: text that is tokenised already is used as it is.
_DEFAULTS: tuple[tuple[str, Kind], ...] = (
    ("input_ids", "tokens"),
    ("tokens", "tokens"),
    ("text", "text"),
    ("messages", "chats"),
)
_HOLDINGS: dict[Kind, str] = {
    "text": "strings",
    "tokens": "lists of integers",
    "chats": "chats (lists of messages, each with role and content)",
}
_INT32_MAX = 2**31 - 1


def choose_column(
    kinds: Mapping[str, Kind | None], column: str | None, name: str, *, types: Mapping[str, str] | None = None
) -> tuple[str, Kind]:
    """Return the column to read and its kind, out of `kinds` (None: no documents) in file `name`.

    It is `column` if given, else the first of input_ids, tokens (lists of integers), text (strings) and messages
    (chats). Raises TokensError that lists the columns of the file.
    """
    there = ", ".join(f"{key} ({types[key]})" if types else key for key in kinds) or "none at all"
    if column is None:
        for default, wanted in _DEFAULTS:
            if kinds.get(default) == wanted:
                return default, wanted
        unfit = next((pair for pair in _DEFAULTS if pair[0] in kinds), None)
        if unfit is not None:
            default, wanted = unfit
            raise TokensError(
                f"column {default} of {name} does not hold {_HOLDINGS[wanted]}; mend it, or name a column of text, of "
                f"token ids or of chats (--column): {there}"
            )
        raise TokensError(
            f"{name} has no column input_ids or tokens (lists of integers), text (strings) or messages (chats); "
            f"name one of its columns: {there}"
        )
    if column not in kinds:
        raise TokensError(f"{name} has no column {column}; its columns are: {there}")
    kind = kinds[column]
    if kind is None:
        raise TokensError(
            f"column {column} of {name} holds neither strings nor lists of integers nor chats; its columns are: {there}"
        )
    return column, kind


def choose_field(schema: pa.Schema, column: str | None, name: str) -> tuple[str, Kind]:
    """Like `choose_column`, for an Arrow schema."""
    kinds = {field.name: kind_of_type(field.type) for field in schema}
    types = {field.name: str(field.type) for field in schema}
    chosen, kind = choose_column(kinds, column, name, types=types)
    if (n := schema.names.count(chosen)) > 1:
        raise TokensError(f"{name} has {n} columns named {chosen}; give each a name of its own")
    return chosen, kind


def kind_of_type(type_: pa.DataType) -> Kind | None:
    """The kind of documents that values of an Arrow type are; None for no kind."""
    types = pa.types
    if types.is_dictionary(type_):
        return "text" if kind_of_type(type_.value_type) == "text" else None
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "text"
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        of = type_.value_type
        is_chat = types.is_struct(of) and of.get_field_index("role") >= 0
        return "tokens" if types.is_integer(of) else "chats" if is_chat else None
    return None


def chunk_texts(chunk: "pa.Array[Any]", name: str) -> Iterator[str]:
    """The strings of a chunk, null as empty.

    Raises TokensError for bytes that are not UTF-8, and for a string that is too long to be a document.
    """
    try:
        values = chunk.to_pylist()
    except UnicodeDecodeError as error:
        raise TokensError(
            f"{name} holds a string that is not UTF-8; write the column again as UTF-8"
        ) from error
    longest = max((len(value) for value in values if value is not None), default=0)
    if longest > MAX_DOCUMENT_NBYTES:
        raise TokensError(
            f"{name} holds a string of {longest:,} characters, and a document has at most {MAX_DOCUMENT_NBYTES:,}; "
            "split it"
        )
    return ("" if value is None else value for value in values)


def chunk_tokens(chunk: "pa.Array[Any]", name: str, first_row: int) -> Iterator[TokenIds]:
    """The lists of a chunk as int32 arrays, null as empty; `first_row` is the number of its first row in the file.

    Raises TokensError for a null id and for one that does not fit int32.
    """
    lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    flat = pc.list_flatten(chunk)
    if flat.null_count:
        at = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
        raise TokensError(f"row {_row(ends, at, first_row)} of {name} has a null among its token ids")
    wide = flat.to_numpy(zero_copy_only=False)
    ids = as_int32(wide)
    if ids is None:
        at = int(np.flatnonzero((wide < 0) | (wide > _INT32_MAX))[0])
        raise TokensError(
            f"row {_row(ends, at, first_row)} of {name} has the token id {wide[at]}, "
            f"but token ids are 0 to {_INT32_MAX}"
        )
    return (ids[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True))


def chunk_chats(chunk: "pa.Array[Any]", name: str, first_row: int) -> Iterator[Chat]:
    """The chats of a chunk, null as empty; `first_row` is the number of its first row in the file.

    Raises TokensError for bytes that are not UTF-8, and for what is no list of messages.
    """
    try:
        values = chunk.to_pylist()
    except UnicodeDecodeError as error:
        raise TokensError(
            f"{name} holds a string that is not UTF-8; write the column again as UTF-8"
        ) from error
    return (chat_of(value, f"row {row} of {name}") for row, value in enumerate(values, first_row))


def as_int32(ids: NDArray[Any]) -> TokenIds | None:
    """Convert integers to int32; None if one is outside 0 to 2**31 - 1."""
    if ids.dtype == np.int32:
        return ids
    if ids.size and (ids.min() < 0 or ids.max() > _INT32_MAX):
        return None
    return ids.astype(np.int32)


def _row(ends: NDArray[np.int64], at: int, first_row: int) -> int:
    return first_row + int(np.searchsorted(ends, at, side="right"))

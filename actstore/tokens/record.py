"""Records without a schema, as in JSON: choosing the key that holds documents, and converting its values."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from actstore.errors import TokensError
from actstore.tokens.batch import TokenIds
from actstore.tokens.column import Kind, as_int32, choose_column
from actstore.tokens.keeping.plain_type import check_there

_PEEKED_RECORDS = 1000


def choose_key(records: Iterable[dict[str, Any]], column: str | None, name: str) -> tuple[str, Kind]:
    """Return the key to read and its kind, by the first records of file `name`, up to where the type is clear.

    Raises TokensError that lists the keys of the records.
    """
    wanted = {column} if column is not None else {"input_ids", "tokens", "text", "messages"}
    kinds: dict[str, Kind | None] = {}
    unclear: dict[str, Kind] = {}  # null or [] so far, with the kind to assume if no other value comes
    for record in islice(records, _PEEKED_RECORDS):
        for key, value in record.items():
            if key in kinds:
                continue
            if value is None or value == []:
                is_ids = value == [] or key in ("input_ids", "tokens")
                guess: Kind = "chats" if key == "messages" else "tokens" if is_ids else "text"
                unclear.setdefault(key, guess)
            else:
                kinds[key] = _kind(value)
                unclear.pop(key, None)
        if wanted & kinds.keys() and not wanted & unclear.keys():
            break
    if not any(kinds.get(key) for key in wanted):
        kinds |= unclear
    there: dict[str, Kind | None] = {**dict.fromkeys(unclear), **kinds}
    return choose_column(there, column, name) if there else (column or "text", "text")


def check_keys(records: Iterable[dict[str, Any]], keep: Sequence[str], name: str) -> None:
    """Check that keys to keep are in the first records of file `name`; later, a record may lack one, which is null.

    Raises TokensError that lists the keys of the records.
    """
    missing = set(keep)
    there: dict[str, None] = {}
    for record in islice(records, _PEEKED_RECORDS if keep else 0):
        missing -= record.keys()
        if not missing:
            return
        there |= dict.fromkeys(record)
    check_there([key for key in keep if key in missing], list(there), name)


def _kind(value: object) -> Kind | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    is_chat = isinstance(value[0], dict) and "role" in value[0]
    return "tokens" if all(type(item) is int for item in value) else "chats" if is_chat else None


def text_of(value: object, where: str) -> str:
    """Convert a value to a string, null to "". Raises TokensError for another type; `where` names the value."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TokensError(f"{where} is a {type(value).__name__} where the records before have a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            # JSON may escape half of a surrogate pair; a tokenizer would fail on it without naming the place.
            raise TokensError(
                f"{where} has half a surrogate pair at character {error.start}; mend it"
            ) from error
    return value


def tokens_of(value: object, where: str) -> TokenIds:
    """Convert a value to token ids, null to none. Raises TokensError for another type or an id out of range."""
    if value is None:
        return np.empty(0, np.int32)
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise TokensError(f"{where} is not a list of integers as in the records before")
    try:
        ids = as_int32(np.array(value, np.int64))
    except OverflowError:
        ids = None
    if ids is None:
        raise TokensError(f"{where} has a token id outside 0 to {2**31 - 1}")
    return ids

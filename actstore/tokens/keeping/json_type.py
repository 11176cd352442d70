"""The Arrow type of a column of JSON values, found from the values one by one."""

from typing import Any, Final

import pyarrow as pa

from actstore.errors import TokensError

_MAX_DEPTH: Final = 16
_MAX_KEYS: Final = 1_000
"""Different keys of the objects at one place of a column at most: each becomes a field of its type."""
_NUMBER_NBYTES: Final = 8
_INT64: Final = range(-(2**63), 2**63)
_TYPES: Final[dict[str, pa.DataType]] = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
}
_NAMES: Final = {
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "str": "a string",
    "list": "a list",
    "dict": "an object",
}


class JsonType:
    """What a column has held so far. The type does not depend on the order of the values.

    Whole numbers are int64, and float64 where others have fractions. Objects are structs with their keys in order of
    the alphabet; a key that an object lacks is null in it.
    """

    def __init__(self, depth: int = 0) -> None:
        self._kind: str | None = None
        self._item: JsonType | None = None
        self._fields: dict[str, JsonType] = {}
        self._depth = depth

    def see(self, value: Any, where: str) -> int:
        """Take note of a value, and return about how many bytes it takes.

        Args:
            value: value as `json` gives it.
            where: column and place of the value, for the message.

        Raises:
            TokensError: it is of another type than the values before, or cannot be kept.
        """
        if value is None:
            return 1
        kind = type(value).__name__
        if isinstance(value, dict):
            kind = "dict"
        if kind not in _NAMES:
            raise TokensError(
                f"{where} is a {kind}, which cannot be kept; keep strings, numbers, lists or objects"
            )
        if self._kind is None or (self._kind, kind) == ("int", "float"):
            self._kind = kind
        elif kind != self._kind and (self._kind, kind) != ("float", "int"):
            raise TokensError(
                f"{where} is {_NAMES[kind]}, and the values before are {_NAMES[self._kind]}; a column that is kept "
                "has one type: mend the source, or leave the column out"
            )
        if kind == "str":
            return _text_nbytes(value, where)
        if kind == "list":
            self._item = self._item or self._below(where)
            return _NUMBER_NBYTES + sum(self._item.see(item, where) for item in value)
        if kind == "dict":
            return _NUMBER_NBYTES + self._see_fields(value, where)
        if kind == "int" and value not in _INT64:
            raise TokensError(f"{where} is {value}, which is beyond 64 bits; keep it as a string")
        return _NUMBER_NBYTES

    def _see_fields(self, value: dict[str, Any], where: str) -> int:
        nbytes = 0
        for key, below in value.items():
            if key not in self._fields:
                if len(self._fields) == _MAX_KEYS:
                    raise TokensError(
                        f"{where} is an object, and objects of this column have more than {_MAX_KEYS:,} different "
                        "keys; leave the column out, or keep it as text"
                    )
                nbytes += _text_nbytes(key, where)
                self._fields[key] = self._below(where)
            nbytes += self._fields[key].see(below, where)
        return nbytes

    def _below(self, where: str) -> "JsonType":
        if self._depth == _MAX_DEPTH:
            raise TokensError(
                f"{where} is nested more than {_MAX_DEPTH} deep; leave the column out, or keep it as text"
            )
        return JsonType(self._depth + 1)

    def arrow(self) -> pa.DataType:
        """The type of all values that were seen."""
        if self._kind is None:
            return pa.null()
        if self._kind == "list":
            assert self._item is not None
            return pa.list_(self._item.arrow())
        if self._kind == "dict":
            return pa.struct([(key, self._fields[key].arrow()) for key in sorted(self._fields)])
        return _TYPES[self._kind]


def _text_nbytes(text: str, where: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        # JSON may escape half of a surrogate pair.
        raise TokensError(f"{where} has half a surrogate pair at character {error.start}; mend it") from error

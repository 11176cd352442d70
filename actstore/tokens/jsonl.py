"""JSON Lines files: one object per line, with the document under one of its keys."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

from actstore.errors import TokensError
from actstore.reason import reason
from actstore.tokens.batch import TextBatch, TokenBatch, in_batches
from actstore.tokens.chats.chat import ChatBatch, chat_of
from actstore.tokens.column import Kind
from actstore.tokens.failure import reading
from actstore.tokens.files import LocatedFile
from actstore.tokens.keeping.row_taker import RowTaker
from actstore.tokens.record import check_keys, choose_key, text_of, tokens_of
from actstore.tokens.text import lines

_MAX_LINE_NBYTES: Final = 64 << 20
"""The most bytes of a line: parsed JSON takes up to thirty times as much memory as its text."""


class JsonlSource:
    """The values of one key as documents: strings, lists of token ids, or chats. A null is an empty document."""

    kind: Kind
    column: str

    def __init__(self, files: tuple[LocatedFile, ...], column: str | None, keep: Sequence[str] = ()) -> None:
        """Choose the key by the first records. Raises TokensError if they cannot be read, or lack a key."""
        self.files = tuple(file.public for file in files)
        self.keep = tuple(keep)
        self._located = files
        self.column, self.kind = choose_key(
            (record for _, record in records(files[0])), column, files[0].name
        )
        check_keys((record for _, record in records(files[0])), self.keep, files[0].name)

    def batches(
        self, kept: RowTaker | None = None
    ) -> Iterator[TextBatch] | Iterator[TokenBatch] | Iterator[ChatBatch]:
        """Yield batches of documents. Raises TokensError, with file and line, for bad JSON, a missing key or a value of
        another type.
        """
        if self.kind == "text":
            return in_batches(text_of(value, where) for where, value in self._values(kept))
        if self.kind == "chats":
            return in_batches(chat_of(value, where) for where, value in self._values(kept))
        return in_batches(tokens_of(value, where) for where, value in self._values(kept))

    def _values(self, kept: RowTaker | None) -> Iterator[tuple[str, Any]]:
        for file in self._located:
            for number, record in records(file):
                if self.column not in record:
                    raise TokensError(
                        f"line {number} of {file.name} has no key {self.column}; "
                        f"its keys are: {', '.join(record) or 'none'}"
                    )
                repeated = record.repeated if isinstance(record, _Repeated) else frozenset()
                for name in (self.column, *self.keep):
                    if name in repeated:
                        raise TokensError(
                            f"line {number} of {file.name} has the key {name} more than once; name each key once"
                        )
                if kept is not None:
                    kept.add_record(record, f"line {number} of {file.name}")
                yield f"{self.column} in line {number} of {file.name}", record[self.column]


class _Repeated(dict[str, Any]):
    """An object with a repeated key: JSON allows it, and every reader treats it differently."""

    repeated: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    repeated = _Repeated(record)
    repeated.repeated = frozenset(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
    return repeated


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object)


def records(file: LocatedFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object in each line, with the line number from 1."""
    with reading(file.name), file.open() as stream:
        for number, line in enumerate(lines(stream, file.name, max_nbytes=_MAX_LINE_NBYTES), 1):
            if not line.strip():
                continue
            try:
                record = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                raise TokensError(f"line {number} of {file.name} is not JSON: {reason(error)}") from error
            if not isinstance(record, dict):
                raise TokensError(
                    f"line {number} of {file.name} is a JSON {type(record).__name__}, not an object with keys"
                )
            yield number, record

"""Opening what is given in memory as a source of documents, identified by what it holds."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, Self

import numpy as np

from actstore.errors import TokensError
from actstore.reason import reason
from actstore.tokens.batch import TextBatch, TokenBatch, in_batches
from actstore.tokens.chats.chat import Chat, ChatBatch, chat_of
from actstore.tokens.column import Kind
from actstore.tokens.files import SourceFile
from actstore.tokens.keeping.row_taker import RowTaker
from actstore.tokens.memory.array import is_array, rows_of, without_padding
from actstore.tokens.memory.items import Document, documents, kind_of, masked, peeked
from actstore.tokens.memory.one_pass import KeptBatches
from actstore.tokens.memory.tables import MASK, Table, is_stream, is_table
from actstore.tokens.record import choose_key, text_of, tokens_of

PREFIX: Final = "memory:"
"""Prefix of the names of sources in memory; the SHA-256 of what they hold follows."""


class MemorySource:
    """Documents in memory. They are all read once when it is opened, so that any mistake in them is found then."""

    kind: Kind
    column: None = None
    keep: tuple[str, ...] = ()

    def __init__(
        self, again: Callable[[], Iterable[Document]], kind: Kind, table: Table | None = None
    ) -> None:
        """
        Args:
            again: gives the documents from the first one on, each time that it is called.
            kind: whether they are text, token ids or chats.
            table: the table that they are a column of, if they are.
        """
        self.kind = kind
        self._table = table
        self._again = again
        self.n_documents, nbytes, self.url = self._identified(0, None)
        self.files = (SourceFile(self.url, nbytes),)

    def _identified(self, start: int, stop: int | None) -> tuple[int, int, str]:
        """(the number, the bytes and the URL of some documents, as of a source without columns)."""
        digest = hashlib.sha256(f"{self.kind}\0".encode())
        n_documents = nbytes = 0
        given: Iterator[Any] = (document for _, batch in self.batches() for document in batch)
        for document in islice(given, start, stop):
            data = _bytes(document)
            digest.update(len(data).to_bytes(8, "little") + data)
            n_documents, nbytes = n_documents + 1, nbytes + len(data)
        return n_documents, nbytes, f"{PREFIX}{digest.hexdigest()}"

    def url_of(self, start: int, stop: int) -> str:
        """The URL of a source of some of these documents alone, with the same columns."""
        return self._with_columns(self._identified(start, stop)[2], start, stop)

    def _with_columns(self, url: str, start: int, stop: int | None) -> str:
        if not self.keep:
            return url
        assert self._table is not None
        digest = hashlib.sha256(f"{url}\0{json.dumps(self.keep)}".encode())
        for value in islice(self._table.values(self.keep), start, stop):
            digest.update(repr(value).encode(errors="surrogatepass") + b"\0")
        return f"{PREFIX}{digest.hexdigest()}"

    def keeping(self, names: tuple[str, ...]) -> Self:
        """The same source, of whose table some columns are read beside the documents, and are part of what it is.

        Raises:
            TokensError: there is no such column, or no table.
        """
        if not names:
            return self
        if self._table is None:
            raise TokensError(
                f"columns {', '.join(names)} are to be kept or to choose positions by, and the prompts are in no "
                "table; give a table of pandas, polars or Arrow, or a Dataset, with a column of prompts"
            )
        self._table.check_columns(names)
        source = copy.copy(self)
        source.keep = names
        # Other labels are another source, or a store would keep those that it has.
        source.url = source._with_columns(self.url, 0, None)
        source.files = (SourceFile(source.url, self.files[0].nbytes),)
        return source

    def batches(
        self, kept: RowTaker | None = None
    ) -> Iterator[TextBatch] | Iterator[TokenBatch] | Iterator[ChatBatch]:
        """Yield batches of documents; see `Source.batches`."""
        given: Any = self._again()
        if kept is not None and self.keep:
            assert self._table is not None
            given = self._table.keeping(self.keep, kept)
        return in_batches(given)


def open_memory(given: Any, *, column: str | None = None, max_documents: int | None = None) -> MemorySource:
    """Open prompts that are given in memory; every row, or item of a list, is a document.

    Args:
        given: texts; lists, arrays or tensors of ids [position]; one array or tensor of ids [n, position]; what a
            tokenizer of Hugging Face returns; a table of pandas, polars or Arrow, or a column of one; a data set of
            Hugging Face; or any other iterable of prompts, which is read to its end and kept in a temporary file.
        column: column of a table. Default: input_ids or tokens if there, else text. A column attention_mask says which
            ids are padding.
        max_documents: how much of an iterable is needed; no more is read of it.

    Raises:
        TokensError: there is nothing in it, or something that is no prompt; the message says which.
        StorageError: there is no space for a temporary file.
    """
    source = _opened(given, column, max_documents)
    if not source.n_documents:
        raise TokensError(f"tokens is {_described(given)} without any prompt; give at least one")
    return source


def _opened(given: Any, column: str | None, max_documents: int | None) -> MemorySource:
    if is_table(given):
        table = Table(given, column)
        return MemorySource(table.__iter__, table.kind, table)
    if is_stream(given):
        return _of_stream(given, column, max_documents)
    if column is not None:
        raise TokensError(f"column {column} is requested, but {_described(given)} has no columns")
    if is_array(given) and given.ndim == 1 and getattr(given.dtype, "kind", "") in "OUT":
        given = given.tolist()  # texts, or rows of several lengths
    if is_array(given):
        return MemorySource(lambda: rows_of(given, "tokens"), "tokens")
    if hasattr(given, "keys") and "input_ids" in given:
        return _of_encoding(given)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise TokensError(
            f"tokens is {_described(given)}; give a path, a list of texts, of token ids or of chats, an array of ids "
            "[n, position], or a table"
        )
    if isinstance(given, bytes | bytearray | set | frozenset):
        raise TokensError(f"tokens is {_described(given)}; give a list of texts or of token ids")
    if isinstance(given, Sequence):
        kind = kind_of(given[0], "prompt 0") if len(given) else "text"
        return MemorySource(lambda: documents(given, kind), kind)
    return _of_iterator(given, max_documents)


def _of_encoding(given: Any) -> MemorySource:
    """The ids that a tokenizer has made, which may be padded."""
    name = _described(given)
    rows, masks = given["input_ids"], given.get(MASK)
    if masks is None:
        return _opened(rows, None, None)
    if getattr(rows, "ndim", 2) == 1 or (len(rows) and isinstance(rows[0], int)):
        raise TokensError(f"the input_ids of {name} are one row; give rows [n, position], or a list of them")
    if len(masks) != len(rows):
        raise TokensError(f"{name} has {len(rows)} rows of input_ids and {len(masks)} of attention_mask")
    return MemorySource(lambda: masked(rows, masks), "tokens")


def _of_iterator(given: Iterable[Any], max_documents: int | None) -> MemorySource:
    """Prompts that can be read only once."""
    try:
        first, items = peeked(islice(given, max_documents))
    except StopIteration:
        return MemorySource(lambda: (), "text")
    kind = kind_of(first, "prompt 0")
    again: Any = documents(items, kind)
    kept = KeptBatches(in_batches(again), kind)
    return MemorySource(kept.__iter__, kind)


def _of_stream(given: Any, column: str | None, max_documents: int | None) -> MemorySource:
    """The records of an ``IterableDataset``, whose columns may be known only from the records."""
    name = f"the data set {type(given).__name__}"
    records = _reading(islice(given.with_format(None), max_documents), name)
    try:
        first, records = peeked(records)
    except StopIteration:
        return MemorySource(lambda: (), "text")
    key, kind = choose_key([first], column, name)

    def each() -> Iterator[Document]:
        for number, record in enumerate(records):
            where = f"{key} in row {number} of {name}"
            value = record.get(key)
            if kind == "text":
                yield text_of(value, where)
                continue
            if kind == "chats":
                yield chat_of(value, where)
                continue
            ids = tokens_of(value, where)
            mask = record.get(MASK)
            yield ids if mask is None else without_padding(ids, mask, where)

    stream: Any = each()
    kept = KeptBatches(in_batches(stream), kind)
    return MemorySource(kept.__iter__, kind)


def _reading(items: Iterable[Any], name: str) -> Iterator[Any]:
    try:
        yield from items
    except Exception as error:  # network, builder and Arrow errors have no common class
        raise TokensError(f"{name} cannot be read: {reason(error)}") from error


def _described(given: Any) -> str:
    kind = type(given).__name__
    if is_array(given):
        return f"a {kind} of shape {tuple(given.shape)}"
    return f"the {kind}" if kind not in ("list", "tuple") else f"a {kind}"


def _bytes(document: Document) -> bytes:
    if isinstance(document, str):
        return document.encode()
    if isinstance(document, Chat):
        return json.dumps(document.messages, sort_keys=True).encode()
    return np.ascontiguousarray(document, "<i4").tobytes()

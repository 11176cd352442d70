"""Datasets of the Hugging Face Hub, streamed through `datasets`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actstore.errors import MissingExtraError, TokensError
from actstore.reason import reason
from actstore.tokens.batch import TextBatch, TokenBatch, in_batches
from actstore.tokens.chats.chat import ChatBatch, chat_of
from actstore.tokens.column import Kind, choose_field, chunk_chats, chunk_texts, chunk_tokens
from actstore.tokens.files import SourceFile
from actstore.tokens.keeping.plain_type import check_there
from actstore.tokens.keeping.row_taker import RowTaker
from actstore.tokens.record import check_keys, choose_key, text_of, tokens_of

PREFIX = "hf:"
_ROWS = 1024
_SPLITS = frozenset({"train", "validation", "valid", "val", "dev", "test"})


@dataclass(frozen=True)
class HubName:
    """The parts of `hf:org/name[:config][:split]`.

    A single part after the name is the split if it is called like one (train, validation, valid, val, dev, test), else
    the config; `hf:org/name::split` gives any other split of the default config. The default split is train.
    """

    name: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, spec: str) -> "HubName":
        """Parse a spec. Raises TokensError if it has another form."""
        name, *parts = spec.removeprefix(PREFIX).split(":")
        if not name or "//" in name or len(parts) > 2:
            raise TokensError(
                f"{spec} is not a dataset name; give hf:org/name, hf:org/name:config or hf:org/name:config:split"
            )
        if len(parts) == 1 and parts[0] in _SPLITS:
            parts.insert(0, "")
        config, split = (*parts, "", "")[:2]
        return cls(name, config or None, split or "train")

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}:{self.config or ''}:{self.split}"


class HubSource:
    """Documents of one column of a `datasets.IterableDataset`, in its order. A null is an empty document."""

    kind: Kind
    column: str

    def __init__(self, dataset: Any, name: str, column: str | None, keep: Sequence[str] = ()) -> None:
        """Open the source; `name` is for messages. Raises TokensError if the dataset cannot be read or lacks a
        column.
        """
        self.files = (SourceFile(name, None),)
        self.keep = tuple(keep)
        self._dataset = dataset
        if dataset.features is None:
            self.column, self.kind = choose_key(self._read(dataset), column, name)
            check_keys(self._read(dataset), self.keep, name)
        else:
            schema = dataset.features.arrow_schema
            self.column, self.kind = choose_field(schema, column, name)
            check_there(self.keep, schema.names, name)

    def batches(
        self, kept: RowTaker | None = None
    ) -> Iterator[TextBatch] | Iterator[TokenBatch] | Iterator[ChatBatch]:
        """Yield batches of documents. Raises TokensError if the dataset cannot be read."""
        name = self.files[0].url
        if self._dataset.features is None:
            # A run of nulls changes the schema of the Arrow table, so records are read one by one.
            if self.kind == "text":
                return in_batches(text_of(value, where) for where, value in self._values(kept))
            if self.kind == "chats":
                return in_batches(chat_of(value, where) for where, value in self._values(kept))
            return in_batches(tokens_of(value, where) for where, value in self._values(kept))
        if self.kind == "text":
            return in_batches(text for _, chunk in self._chunks(kept) for text in chunk_texts(chunk, name))
        if self.kind == "chats":
            return in_batches(
                chat for row, chunk in self._chunks(kept) for chat in chunk_chats(chunk, name, row)
            )
        return in_batches(ids for row, chunk in self._chunks(kept) for ids in chunk_tokens(chunk, name, row))

    def _values(self, kept: RowTaker | None) -> Iterator[tuple[str, Any]]:
        for number, record in enumerate(self._read(self._dataset)):
            where = f"row {number} of {self.files[0].url}"
            if kept is not None:
                kept.add_record(record, where)
            yield f"{self.column} in {where}", record.get(self.column)

    def _chunks(self, kept: RowTaker | None) -> "Iterator[tuple[int, pa.Array[Any]]]":
        row = 0
        columns = [self.column, *(name for name in self.keep if kept is not None and name != self.column)]
        tables = self._dataset.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS)
        for table in self._read(tables):
            for batch in table.to_batches():
                if kept is not None:
                    kept.add_rows(batch)
                yield row, batch.column(self.column)
                row += batch.num_rows

    def _read(self, items: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from items
        except Exception as error:  # network, builder and Arrow errors have no common class
            raise TokensError(f"{self.files[0].url} cannot be read: {reason(error)}") from error


def open_hub(spec: str, column: str | None, keep: Sequence[str] = ()) -> HubSource:
    """Open `hf:org/name[:config][:split]` for streaming.

    Raises MissingExtraError without `datasets`, and TokensError if the dataset cannot be opened.
    """
    name = HubName.parse(spec)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            f"{spec} needs the package datasets, which is not installed; run pip install 'actstore[hf]'"
        ) from error
    try:
        dataset = load_dataset(name.name, name.config, split=name.split, streaming=True)
    except Exception as error:  # network, authorisation and builder errors have no common class
        raise TokensError(f"{spec} cannot be opened: {reason(error)}") from error
    return HubSource(dataset, str(name), column, keep)

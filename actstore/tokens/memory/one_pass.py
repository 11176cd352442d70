"""Documents that can be read only once, kept in a temporary file so that they can be read again."""

import json
import tempfile
import weakref
from collections.abc import Iterator
from io import IOBase
from typing import Any, cast

import pyarrow as pa

from actstore.errors import StorageError
from actstore.reason import reason
from actstore.tokens.batch import TextBatch, TokenBatch
from actstore.tokens.chats.chat import ChatBatch, chat_of
from actstore.tokens.column import Kind, chunk_texts, chunk_tokens


class KeptBatches:
    """Batches of documents in a file without a name, which ends with this object or the process."""

    def __init__(
        self, batches: "Iterator[TextBatch] | Iterator[TokenBatch] | Iterator[ChatBatch]", kind: Kind
    ) -> None:
        """Read the batches to their end. Raises StorageError if there is no space for them."""
        self._kind = kind
        type_ = pa.large_list(pa.int32()) if kind == "tokens" else pa.large_string()
        schema = pa.schema([("document", type_)])
        try:
            self._file = cast(IOBase, tempfile.TemporaryFile(prefix="actstore-prompts-"))  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            with pa.ipc.new_stream(self._file, schema) as stream:
                for _, documents in batches:
                    values: Any = documents
                    if kind == "chats":
                        values = [json.dumps(chat.messages) for chat in values]
                    column: Any = pa.array(values, type=type_)
                    stream.write_batch(pa.record_batch([column], schema=schema))
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"the prompts cannot be kept in {tempfile.gettempdir()}: {reason(error)}"
            ) from error

    def __iter__(self) -> Iterator[str] | Iterator[Any]:
        """The documents again, from the first one on."""
        self._file.seek(0)
        row = 0
        for batch in pa.ipc.open_stream(self._file):
            if self._kind == "text":
                yield from chunk_texts(batch.column(0), "the prompts")
            elif self._kind == "chats":
                for number, text in enumerate(batch.column(0).to_pylist(), row):
                    yield chat_of(json.loads(str(text)), f"prompt {number}")
            else:
                yield from chunk_tokens(batch.column(0), "the prompts", row)
            row += batch.num_rows

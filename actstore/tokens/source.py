"""Sources of documents: files of text or tables at any fsspec URL, or a Hugging Face Hub dataset."""

from collections.abc import Iterator, Sequence
from typing import Protocol, cast, get_args

from actstore.errors import TokensError
from actstore.tokens.batch import TextBatch, TokenBatch
from actstore.tokens.chats.chat import ChatBatch
from actstore.tokens.column import Kind
from actstore.tokens.files import SourceFile, locate
from actstore.tokens.hub import PREFIX, open_hub
from actstore.tokens.jsonl import JsonlSource
from actstore.tokens.keeping.row_taker import RowTaker
from actstore.tokens.memory.opening import PREFIX as PREFIX_IN_MEMORY
from actstore.tokens.table import TableSource
from actstore.tokens.text import TextSource, Unit

__all__ = ["Source", "SourceFile", "chats_of", "open_source"]


class Source(Protocol):
    """Documents in a fixed order. A document's number is its index in the source, counting empty documents."""

    @property
    def kind(self) -> Kind:
        """Whether documents are strings, token ids already, or chats."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that are read, in reading order."""

    @property
    def column(self) -> str | None:
        """The column that is read; None for plain text."""

    @property
    def keep(self) -> tuple[str, ...]:
        """Columns that are read beside the documents."""

    def batches(
        self, kept: RowTaker | None = None
    ) -> Iterator[TextBatch] | Iterator[TokenBatch] | Iterator[ChatBatch]:
        """Yield the number of a batch's first document and its documents, from document 0 on, in bounded memory.

        Each call reads the source again. ``kept`` gets the row of each document, of the columns `keep`, before the
        document is yielded. Raises TokensError for what cannot be read, naming file and place.
        """


def chats_of(source: Source, kept: RowTaker | None = None) -> Iterator[ChatBatch]:
    """The batches of a source of chats; `kept` gets the columns that the source keeps. Raises the errors of the
    source.
    """
    if source.kind != "chats":
        raise TokensError(f"{source.files[0].url} holds {source.kind}, not chats")
    return cast(Iterator[ChatBatch], source.batches(kept))


def open_source(
    spec: str,
    *,
    column: str | None = None,
    documents: Unit = "file",
    keep: Sequence[str] = (),
    chat: bool | None = None,
) -> Source:
    """Open a path, fsspec URL, glob, directory or `hf:org/name[:config][:split]`; almost nothing is read yet.

    `column` defaults to the first of input_ids, tokens (lists of integers), text and messages (chats). `documents` says
    what one document is in .txt files: the file, each paragraph (blank lines between), or each line. `keep` names
    columns that are read beside the documents. `chat` says that documents must be chats, by default those of the column
    messages, or that they must not.

    Raises TokensError if nothing is there, the format is not supported or the first file lacks a column, or if there
    are chats where none are wanted or none where they are, and MissingExtraError if a package for the protocol or the
    hub is not installed.
    """
    if spec.startswith(PREFIX_IN_MEMORY) and not spec.startswith(f"{PREFIX_IN_MEMORY}//"):
        raise TokensError(
            f"{spec} stands for prompts that were given in memory, and no file has them; give the same prompts again, "
            "from Python"
        )
    source = _opened(spec, "messages" if chat and column is None else column, documents, keep)
    if chat is not None and chat != (source.kind == "chats"):
        what = f"column {source.column} of {spec}" if source.column else spec
        raise TokensError(
            f"{what} holds {source.kind}, and chat is {str(chat).lower()}; name a column with "
            + ("lists of messages, each with role and content" if chat else "text or token ids")
        )
    return source


def _opened(spec: str, column: str | None, documents: Unit, keep: Sequence[str]) -> Source:
    if documents not in get_args(Unit):
        raise TokensError(f"documents is {documents!r}; choose file, paragraph or line")
    if spec.startswith(PREFIX) and not spec.startswith("hf://"):
        return open_hub(spec, column, keep)
    files = locate(spec)
    if files[0].format == "text":
        if column is not None:
            raise TokensError(
                f"column {column} is requested, but {files[0].name} is plain text without columns"
            )
        if keep:
            raise TokensError(
                f"the columns {', '.join(keep)} are to be kept or to choose positions by, but {files[0].name} is plain "
                "text without columns; leave them out, or write the text as .jsonl or .parquet with these columns"
            )
        return TextSource(files, documents)
    if documents != "file":
        raise TokensError(
            f"documents={documents!r} splits plain text, but {files[0].name} is a {files[0].format} file, "
            "where each row is a document"
        )
    return (
        JsonlSource(files, column, keep) if files[0].format == "jsonl" else TableSource(files, column, keep)
    )

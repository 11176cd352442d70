"""Sources of documents: files of text or tables at any fsspec URL, or a Hugging Face Hub dataset."""

from collections.abc import Iterator, Sequence
from typing import Protocol, get_args

from actstore.errors import TokensError
from actstore.tokens.batch import TextBatch, TokenBatch
from actstore.tokens.column import Kind
from actstore.tokens.files import SourceFile, locate
from actstore.tokens.hub import PREFIX, open_hub
from actstore.tokens.jsonl import JsonlSource
from actstore.tokens.keeping.kept_rows import KeptRows
from actstore.tokens.table import TableSource
from actstore.tokens.text import TextSource, Unit

__all__ = ["Source", "SourceFile", "open_source"]


class Source(Protocol):
    """Documents in a fixed order. A document's number is its index in the source, counting empty documents."""

    @property
    def kind(self) -> Kind:
        """Whether documents are strings or token ids already."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that are read, in reading order."""

    @property
    def column(self) -> str | None:
        """The column that is read; None for plain text."""

    @property
    def keep(self) -> tuple[str, ...]:
        """Columns that can be kept beside the documents."""

    def batches(self, kept: KeptRows | None = None) -> Iterator[TextBatch] | Iterator[TokenBatch]:
        """Yield the number of a batch's first document and its documents, from document 0 on, in bounded memory.

        Each call reads the source again. ``kept`` gets the row of each document, of the columns `keep`, before the
        document is yielded. Raises TokensError for what cannot be read, naming file and place.
        """


def open_source(
    spec: str, *, column: str | None = None, documents: Unit = "file", keep: Sequence[str] = ()
) -> Source:
    """Open a path, fsspec URL, glob, directory or `hf:org/name[:config][:split]`; almost nothing is read yet.

    `column` defaults to the first of input_ids, tokens (lists of integers) and text. `documents` says what
    one document is in .txt files: the file, each paragraph (blank lines between), or each line. `keep` names columns
    that are kept beside the documents.

    Raises TokensError if nothing is there, the format is not supported or the first file lacks a column, and
    MissingExtraError if a package for the protocol or the hub is not installed.
    """
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
                f"keep names the columns {', '.join(keep)}, but {files[0].name} is plain text without columns; leave "
                "keep out, or write the text as .jsonl or .parquet with these columns"
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

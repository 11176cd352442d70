"""Plain text files: a document is a file, a paragraph or a line."""

from collections.abc import Iterator
from typing import BinaryIO, Final, Literal

from actstore.errors import TokensError
from actstore.tokens.batch import MAX_DOCUMENT_NBYTES, TextBatch, in_batches
from actstore.tokens.failure import decode, reading
from actstore.tokens.files import LocatedFile, probe
from actstore.tokens.keeping.row_taker import RowTaker

Unit = Literal["file", "paragraph", "line"]

_CHUNK_NBYTES: Final = 1 << 20
_BOM: Final = b"\xef\xbb\xbf"


class TextSource:
    """The documents of .txt files. A byte order mark is dropped; otherwise a whole file is kept to the byte."""

    kind: Literal["text"] = "text"
    column: None = None
    keep: tuple[str, ...] = ()

    def __init__(self, files: tuple[LocatedFile, ...], documents: Unit) -> None:
        """Open the source. Raises TokensError if the first file cannot be read."""
        probe(files[0])
        self.files = tuple(file.public for file in files)
        self._located = files
        self._documents = documents

    def batches(self, kept: RowTaker | None = None) -> Iterator[TextBatch]:
        """Yield batches of documents. Text has no columns, so ``kept`` gets nothing.

        Raises TokensError for a file that is gone, damaged or not UTF-8, and for a document that is too large.
        """
        assert kept is None  # `open_source` refuses to keep columns
        return in_batches(text for file in self._located for text in self._read(file))

    def _read(self, file: LocatedFile) -> Iterator[str]:
        with reading(file.name), file.open() as stream:
            if self._documents == "file":
                data = _whole(stream, file.name)
                bom = len(_BOM) if data.startswith(_BOM) else 0
                yield decode(data[bom:], file.name, start=bom)
            elif self._documents == "line":
                # A blank line is an empty document, so a document's number is that of its line, counted from 0.
                yield from (line if line.strip() else "" for line in lines(stream, file.name))
            else:
                yield from _paragraphs(lines(stream, file.name), file.name)


def _whole(stream: BinaryIO, name: str) -> bytes:
    chunks, nbytes = [], 0
    while chunk := stream.read(_CHUNK_NBYTES):
        chunks.append(chunk)
        nbytes += len(chunk)
        if nbytes > MAX_DOCUMENT_NBYTES:
            raise TokensError(
                f"{name} has more than {_mib(MAX_DOCUMENT_NBYTES)} of text, which is the most that one document may "
                "have; split it with documents: paragraph or line (--documents), or into several files"
            )
    return b"".join(chunks)


def lines(stream: BinaryIO, name: str, *, max_nbytes: int = MAX_DOCUMENT_NBYTES) -> Iterator[str]:
    """The decoded lines without their line ends (LF or CR LF) and without a byte order mark.

    Raises TokensError for a line of more than `max_nbytes`, before it is read to its end, and for one that is not
    UTF-8.
    """
    start = 0
    for line in _raw_lines(stream, name, max_nbytes):
        bom = len(_BOM) if start == 0 and line.startswith(_BOM) else 0
        yield decode(line[bom:], name, start=start + bom).removesuffix("\r")
        start += len(line) + 1


def _raw_lines(stream: BinaryIO, name: str, max_nbytes: int) -> Iterator[bytes]:
    """The lines without their LF. Only `read` is used, since not every storage can read up to a line end."""
    number, begun, nbytes = 1, list[bytes](), 0
    while chunk := stream.read(_CHUNK_NBYTES):
        first, *others = chunk.split(b"\n")
        begun.append(first)
        nbytes += len(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            number += len(others)
            begun, nbytes = [others[-1]], len(others[-1])
        if nbytes > max_nbytes:
            raise TokensError(
                f"line {number} of {name} has more than {_mib(max_nbytes)} (of decompressed text), which is the most "
                "that one line may have; split it into several lines"
            )
    if nbytes:
        yield b"".join(begun)


def _paragraphs(source: Iterator[str], name: str) -> Iterator[str]:
    paragraph: list[str] = []
    size = 0
    for number, line in enumerate(source, 1):
        if line.strip():
            paragraph.append(line)
            size += len(line) + 1
            if size > MAX_DOCUMENT_NBYTES:
                raise TokensError(
                    f"the paragraph around line {number} of {name} has more than "
                    f"{_mib(MAX_DOCUMENT_NBYTES)} of text, which is the most that one document may have; separate "
                    "paragraphs by blank lines, or choose documents: line (--documents)"
                )
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph, size = [], 0
    if paragraph:
        yield "\n".join(paragraph)


def _mib(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB"

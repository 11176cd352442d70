"""Plain text files: a document is a file, a paragraph or a line."""

from collections.abc import Iterator
from typing import BinaryIO, Literal

from actstore.tokens.batch import TextBatch, in_batches
from actstore.tokens.failure import decode, reading
from actstore.tokens.files import LocatedFile, probe

Unit = Literal["file", "paragraph", "line"]

_BOM = b"\xef\xbb\xbf"


class TextSource:
    """Documents of .txt files. A byte order mark is dropped; a whole file is otherwise kept to the byte."""

    kind: Literal["text"] = "text"
    column: None = None

    def __init__(self, files: tuple[LocatedFile, ...], documents: Unit) -> None:
        """Raises TokensError when the first file cannot be read."""
        probe(files[0])
        self.files = tuple(file.public for file in files)
        self._located = files
        self._documents = documents

    def batches(self) -> Iterator[TextBatch]:
        """Raises TokensError for a file that is gone, damaged or not UTF-8."""
        return in_batches(text for file in self._located for text in self._read(file))

    def _read(self, file: LocatedFile) -> Iterator[str]:
        with reading(file.name), file.open() as stream:
            if self._documents == "file":
                data = stream.read()
                bom = len(_BOM) if data.startswith(_BOM) else 0
                yield decode(data[bom:], file.name, start=bom)
            elif self._documents == "line":
                # A blank line is an empty document, so a document's number is its line's, counted from 0.
                yield from (line if line.strip() else "" for line in lines(stream, file.name))
            else:
                yield from _paragraphs(lines(stream, file.name))


def lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """Decoded lines without their line ends (LF or CR LF) and without a byte order mark."""
    start = 0
    for line in stream:
        bom = len(_BOM) if start == 0 and line.startswith(_BOM) else 0
        yield decode(line[bom:], name, start=start + bom).removesuffix("\n").removesuffix("\r")
        start += len(line)


def _paragraphs(source: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in source:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)

"""Reading pairs of prompts from files, each with the place that messages name."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

from actstore.errors import PatchError
from actstore.tokens.failure import reading
from actstore.tokens.files import LocatedFile, locate
from actstore.tokens.jsonl import records

_SUPPORTED: Final = ".jsonl/.ndjson (also .gz, .zst) and .parquet"
COLUMNS: Final = ("clean", "corrupted", "answer", "wrong")


def read_pairs(source: str, limit: int | None) -> list[tuple[str, dict[str, Any]]]:
    """The pairs in files, in order: (place, such as ``line 3 of pairs.jsonl``; columns).

    Args:
        source: path, glob or URL of .jsonl or .parquet files.
        limit: the most pairs; None for all.

    Raises:
        TokensError: a file cannot be read.
        PatchError: the files have another format, or hold no pairs.
    """
    files = locate(source, supported=_SUPPORTED, places="a file, a directory or a glob")
    if files[0].format not in ("jsonl", "parquet"):
        raise PatchError(f"{files[0].name} is no file of pairs; give .jsonl or .parquet files")
    pairs = list(islice((pair for file in files for pair in _pairs_in(file)), limit))
    if not pairs:
        raise PatchError(f"{source} holds no pairs; give one a line, with {', '.join(COLUMNS)}")
    return pairs


def _pairs_in(file: LocatedFile) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.format == "jsonl":
        for number, record in records(file):
            yield f"line {number} of {file.name}", record
        return
    import pyarrow.parquet as pq

    with reading(file.name), file.open() as stream:
        table = pq.ParquetFile(stream)
        columns = [name for name in table.schema_arrow.names if name in COLUMNS]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                yield f"row {number} of {file.name}", record
                number += 1

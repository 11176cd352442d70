"""Sources that unpack to more than memory holds are refused with file, line and limit, in seconds and little memory."""

import gzip
import resource
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from actstore.errors import TokensError
from actstore.tokens import open_source
from actstore.tokens.batch import MAX_DOCUMENT_NBYTES

GIB = 1 << 30
_READ = """
import sys, resource
from actstore.errors import TokensError
from actstore.tokens import open_source
import pyarrow.parquet, fsspec.implementations.local, fsspec.implementations.http
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]),) * 2)
try:
    for _ in open_source(sys.argv[1], documents=sys.argv[2]).batches():
        pass
except TokensError as error:
    print(error)
"""


def message_of(path: object, documents: str = "file", *, nbytes: int = 2 * GIB) -> str:
    """The error of reading a source in a process that is limited to so many bytes of memory."""
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", _READ, str(path), documents, str(nbytes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - started < 60
    return ended.stdout.strip()


def zeros(nbytes: int) -> bytes:
    """A zstd frame that unpacks to so many zeros."""
    compressor = zstandard.ZstdCompressor(3).compressobj()
    chunk = bytes(16 << 20)
    return b"".join(compressor.compress(chunk) for _ in range(nbytes // len(chunk))) + compressor.flush()


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A line of text, then one of 6 GB, in 0.2 MB."""
    head = zstandard.ZstdCompressor().compress(b'{"text": "a"}\n\n{"text": "')
    data = head + zeros(64 << 20) * 96
    assert len(data) < 1 << 20
    return data


def test_line_of_many_gigabytes_of_json(tmp_path: Path, bomb: bytes) -> None:
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(bomb)
    assert message_of(file) == (
        f"line 3 of {file} has more than 64 MiB (of decompressed text), which is the most that one line may have; "
        "split it into several lines"
    )


@pytest.mark.parametrize("documents", ["file", "paragraph", "line"])
def test_text_of_many_gigabytes(tmp_path: Path, bomb: bytes, documents: str) -> None:
    file = tmp_path / "a.txt.zst"
    file.write_bytes(bomb)
    if documents == "file":
        assert message_of(file, documents) == (
            f"{file} has more than 256 MiB of text, which is the most that one document may have; split it with "
            "documents: paragraph or line (--documents), or into several files"
        )
    else:
        assert message_of(file, documents).startswith(f"line 3 of {file} has more than 256 MiB (of")


def test_gzip_is_bounded_too(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    with file.open("wb") as raw, gzip.open(raw, "wb", compresslevel=1) as stream:
        for _ in range(12):
            stream.write(bytes(16 << 20))
    assert message_of(file, nbytes=GIB).startswith(f"line 1 of {file} has more than 64 MiB")


def test_paragraph_of_many_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.zst"
    compressor = zstandard.ZstdCompressor().compressobj()
    lines = (b"x" * 1023 + b"\n") * 1024
    data = b"".join(compressor.compress(lines) for _ in range(300)) + compressor.flush()
    file.write_bytes(data)
    text = message_of(file, "paragraph")
    assert text.startswith(
        f"the paragraph around line {(MAX_DOCUMENT_NBYTES >> 10) + 1} of {file} has more than"
    )


def test_same_over_a_url(bomb: bytes) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/bomb.jsonl.zst", bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TokensError, match="line 3 of memory://.*bomb.jsonl.zst has more than 64 MiB"):
        list(open_source("memory://bomb.jsonl.zst").batches())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIB >> 10
    files.rm("/bomb.jsonl.zst")


def test_one_value_of_a_parquet_file_in_many_rows(tmp_path: Path) -> None:
    # A thousand rows with this value would be 32 GB.
    words = pa.array(["x" * (32 << 20)])
    column = pa.DictionaryArray.from_arrays(np.zeros(20, np.int32), words)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column.cast(pa.string())}), file, compression="zstd")
    assert file.stat().st_size < 1 << 20
    assert message_of(file) == ""


def test_list_of_a_parquet_file_that_unpacks_without_end(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    n_ids = 150_000_000
    ids = pa.ListArray.from_arrays(pa.array([0, n_ids], pa.int32()), pa.array(np.zeros(n_ids, np.int32)))
    pq.write_table(pa.table({"input_ids": ids}), file, compression="zstd")
    assert file.stat().st_size < 10_000
    assert message_of(file).startswith(f"column input_ids of {file} unpacks from ")


def test_string_of_a_table_that_is_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.tokens.column.MAX_DOCUMENT_NBYTES", 1000)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 1000, "x" * 1001]}), file)
    with pytest.raises(
        TokensError, match="holds a string of 1,001 characters, and a document has at most 1,000"
    ):
        list(open_source(str(file)).batches())

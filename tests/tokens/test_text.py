"""Documents of .txt files."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard

from actstore.errors import TokensError
from actstore.tokens import open_source

TEXT = "first line\nsecond line\n\n  \nthird, naïve 🦜\r\n\nfourth"


def documents(spec: str, unit: Any = "file") -> list[Any]:
    """All documents; their numbers must run from 0 on without gaps."""
    source = open_source(spec, documents=unit)
    assert (source.kind, source.column) == ("text", None)
    texts: list[Any] = []
    for first, batch in source.batches():
        assert first == len(texts)
        texts += batch
    return texts


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", [TEXT]),
        ("paragraph", ["first line\nsecond line", "third, naïve 🦜", "fourth"]),
        ("line", ["first line", "second line", "", "", "third, naïve 🦜", "", "fourth"]),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_documents(tmp_path: Path, unit: str, expected: list[str], suffix: str) -> None:
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    compress = compressors[suffix]
    for prefix in (b"", b"\xef\xbb\xbf"):
        (tmp_path / f"a.txt{suffix}").write_bytes(compress(prefix + TEXT.encode()))
        assert documents(f"{tmp_path}/a.txt{suffix}", unit) == expected


def test_files_follow_each_other_in_sorted_order(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.txt").write_text("" if name == "b" else name)
    assert documents(f"{tmp_path}/*.txt") == ["a", "", "c"]
    assert documents(str(tmp_path), "line") == ["a", "c"]
    source = open_source(str(tmp_path))
    assert [file.nbytes for file in source.files] == [1, 0, 1]
    assert list(source.batches()) == list(source.batches())


def test_a_memory_url() -> None:
    fsspec.filesystem("memory").pipe("/tokens-text/a.txt", TEXT.encode())
    assert documents("memory://tokens-text/a.txt") == [TEXT]


def test_many_documents_come_in_several_batches(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(10_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert documents(f"{tmp_path}/a.txt", "line") == lines
    assert len(list(open_source(f"{tmp_path}/a.txt", documents="line").batches())) == 3
    (tmp_path / "b.txt").write_text("x" * 3_000_000 + "\n" + "y" * 3_000_000)
    assert [len(batch) for _, batch in open_source(f"{tmp_path}/b.txt", documents="line").batches()] == [1, 1]


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path: Path, unit: Any, prefix: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(prefix + b"good\nbad \xff\xfe here")
    offset = len(prefix) + 9
    with pytest.raises(TokensError, match=f"a.txt is not UTF-8: byte 0xff at byte offset {offset} "):
        documents(f"{tmp_path}/a.txt", unit)


def test_damaged_and_cut_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(b"not compressed")
    with pytest.raises(TokensError, match=r"a.txt.gz is damaged or not compressed as its suffix says"):
        documents(f"{tmp_path}/a.txt.gz")
    (tmp_path / "b.txt.zst").write_bytes(b"not compressed")
    with pytest.raises(TokensError, match=r"b.txt.zst is damaged or not compressed as its suffix says"):
        documents(f"{tmp_path}/b.txt.zst")
    whole = zstandard.ZstdCompressor().compress(os.urandom(10_000).hex().encode())
    (tmp_path / "c.txt.zst").write_bytes(whole[:-100])
    with pytest.raises(TokensError, match=r"c.txt.zst is cut short: its compressed data ends too early"):
        documents(f"{tmp_path}/c.txt.zst")


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    source = open_source(f"{tmp_path}/a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(TokensError, match=r"a.txt is gone: it was there when the source was opened"):
        list(source.batches())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_fails_on_opening(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(TokensError, match=r"no permission to read .*a.txt: Permission denied"):
        open_source(f"{tmp_path}/a.txt")
    (tmp_path / "folder").mkdir(0)
    with pytest.raises(TokensError, match=r"no permission to list .*folder: Permission denied"):
        open_source(f"{tmp_path}/folder")

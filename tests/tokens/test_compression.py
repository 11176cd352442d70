"""Compressed files with several members, cut short, and damaged."""

import gzip
import io
from collections.abc import Callable

import pytest
import zstandard

from actstore.tokens.compression import decompressed

DATA = bytes(range(256)) * 4000
Compress = Callable[[bytes], bytes]
FORMATS: list[tuple[str, Compress]] = [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]


def read(data: bytes, suffix: str) -> bytes:
    with decompressed(io.BytesIO(data), f"a.txt{suffix}") as stream:
        return stream.read()


@pytest.mark.parametrize(("suffix", "compress"), FORMATS)
def test_one_member_several_and_none(suffix: str, compress: Compress) -> None:
    assert read(compress(DATA), suffix) == DATA
    assert read(compress(DATA) + compress(b"") + compress(DATA[:9]), suffix) == DATA + DATA[:9]
    assert read(compress(b""), suffix) == b""
    assert read(b"", suffix) == b""


@pytest.mark.parametrize(("suffix", "compress"), FORMATS)
@pytest.mark.parametrize("members", [1, 2])
def test_cut_short_raises_and_never_just_ends(suffix: str, compress: Compress, members: int) -> None:
    data = compress(DATA)
    cut = data * (members - 1) + data[: len(data) // 2]
    with pytest.raises(EOFError):
        read(cut, suffix)


def test_lines_and_the_file_below_is_closed() -> None:
    for suffix, compress in FORMATS:
        raw = io.BytesIO(compress(b"one\ntwo\n\nthree"))
        with decompressed(raw, f"a.jsonl{suffix}") as stream:
            assert list(stream) == [b"one\n", b"two\n", b"\n", b"three"]
        assert raw.closed


def test_other_suffixes_are_read_as_they_are() -> None:
    assert read(b"plain", "") == b"plain"

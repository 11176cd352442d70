"""Reading .gz and .zst files as plain bytes. A file that is cut short raises an error, and never just ends early."""

import gzip
import io
from collections.abc import Iterator
from typing import BinaryIO, cast

import zstandard

CHUNK_NBYTES = 64 * 1024
_PIECE_NBYTES = 2 * 1024
"""Compressed bytes that zstandard gets at once. It returns all that they unpack to, up to 2**15 times as much."""


class _Chunks(io.RawIOBase):
    """A file object over an iterator of non-empty byte strings; it closes the file they come from."""

    def __init__(self, chunks: Iterator[bytes], raw: BinaryIO) -> None:
        self._chunks = chunks
        self._raw = raw
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._left:
            self._left = memoryview(next(self._chunks, b""))
        n = min(len(buffer), len(self._left))
        buffer[:n] = self._left[:n]
        self._left = self._left[n:]
        return n

    def close(self) -> None:
        self._raw.close()
        super().close()


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream_reader stops after the first frame by default, and takes a cut file for a complete
    # one.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    in_frame = False
    while chunk := raw.read(CHUNK_NBYTES):
        for start in range(0, len(chunk), _PIECE_NBYTES):
            piece = chunk[start : start + _PIECE_NBYTES]
            while piece:
                in_frame = True
                if data := frame.decompress(piece):
                    yield data
                piece = b""
                if frame.eof:
                    piece = frame.unused_data
                    frame = decompressor.decompressobj()
                    in_frame = False
    if in_frame:
        raise EOFError("the last zstd frame is incomplete")


def decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    """The plain bytes of `raw`: .gz and .zst files, by the suffix of `path`, with any number of members, or as they
    are.

    Reading raises EOFError if the file is cut short, and gzip.BadGzipFile, zlib.error or zstandard.ZstdError if it is
    damaged.
    """
    if path.lower().endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(_GzipFile(raw)))
    if path.lower().endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_Chunks(_zstd_chunks(raw), raw), 1 << 20))
    return raw


class _GzipFile(gzip.GzipFile):
    """A GzipFile that closes the file it reads."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self._raw = raw

    def close(self) -> None:
        super().close()
        self._raw.close()

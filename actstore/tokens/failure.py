"""Turns errors of other libraries while reading into one `TokensError` of one sentence."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import zstandard

from actstore.errors import TokensError
from actstore.reason import reason


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raise TokensError, naming the file `name`, for failures of storage, decompression or Arrow inside."""
    try:
        yield
    except FileNotFoundError as error:
        raise TokensError(f"{name} is gone: it was there when the source was opened") from error
    except PermissionError as error:
        raise TokensError(f"no permission to read {name}: {reason(error)}") from error
    except EOFError as error:
        raise TokensError(
            f"{name} is cut short: its compressed data ends too early, so fetch it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise TokensError(
            f"{name} is damaged or not compressed as its suffix says: {reason(error)}"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise TokensError(f"{name} cannot be read: {reason(error)}") from error


def decode(data: bytes, name: str, *, start: int = 0) -> str:
    """Decode `data` as UTF-8; `start` is its byte offset in the (decompressed) file `name`.

    Raises TokensError with the byte offset of the first bytes that are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokensError(
            f"{name} is not UTF-8: byte {data[error.start]:#04x} at byte offset {start + error.start} "
            "(of the decompressed text); convert the file to UTF-8"
        ) from error

"""The bytes of a shard: the tensor itself, then the index that makes it valid Zarr v3."""

import struct
from dataclasses import dataclass
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actstore.store.layout import ArrayLayout

Bytes = bytes | NDArray[np.uint8]
"""What can be written as it lies in memory."""


def view(part: Bytes) -> memoryview:
    """The same memory, as what files and sockets take."""
    return memoryview(part if isinstance(part, bytes) else part.data).cast("B")


MISSING: Final = 2**64 - 1
"""Offset and size of an inner chunk that is not there."""


def index(layout: ArrayLayout, shard: int) -> bytes:
    """The index of one shard: for each inner chunk its (offset, nbytes) as little-endian uint64, then crc32c.

    Source: the Zarr v3 codec ``sharding_indexed``, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
    """
    chunk_nbytes = layout.chunk_rows * layout.row_nbytes
    present = layout.chunks_in(shard)
    pairs = np.full((layout.chunks_per_shard, 2), MISSING, dtype="<u8")
    pairs[:present, 0] = np.arange(present, dtype=np.uint64) * np.uint64(chunk_nbytes)
    pairs[:present, 1] = chunk_nbytes
    encoded = pairs.tobytes()
    return encoded + struct.pack("<I", google_crc32c.value(encoded))


@dataclass(frozen=True)
class Shard:
    """One shard, ready to be written."""

    key: str
    parts: tuple[Bytes, ...]
    """Data and index; written one after the other, without joining them first."""
    nbytes: int
    crc32c: int
    """Over all parts, as the object lies in storage."""


def encode(layout: ArrayLayout, shard: int, rows: NDArray[Any]) -> Shard:
    """Wrap the rows of one shard; the data is not copied.

    Args:
        layout: the array.
        shard: its number.
        rows: C-contiguous [rows, ...] in the storage type, padded to whole inner chunks:
            ``layout.chunks_in(shard) * layout.chunk_rows`` rows.
    """
    if rows.nbytes != layout.data_nbytes(shard) or not rows.flags.c_contiguous:
        raise ValueError(
            f"shard {shard} of {layout.path} needs {layout.data_nbytes(shard)} contiguous bytes, got {rows.nbytes}"
        )
    data = rows.reshape(-1).view(np.uint8)
    tail = index(layout, shard)
    crc = google_crc32c.extend(google_crc32c.value(data), tail)
    return Shard(layout.key(shard), (data, tail), data.nbytes + len(tail), crc)


def crc32c(data: Bytes) -> int:
    """CRC-32C (Castagnoli), as in RFC 3720."""
    return int(google_crc32c.value(data))

"""The bytes of a shard: its chunks, then the index that makes it valid Zarr v3.

In an uncompressed shard, the chunks are the tensor itself. `encode` makes the bytes, and `put` in
`actstore.store.records.shard_writer` writes them.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from crc32c import crc32c as _crc32c
from numpy.typing import NDArray

from actstore.storage.blobs import Bytes, view
from actstore.store.format.compression import compress
from actstore.store.format.layout import ArrayLayout

MISSING: Final = 2**64 - 1
"""Offset and size of a missing inner chunk."""
CRC_NBYTES: Final = 4


def index(layout: ArrayLayout, shard: int, sizes: Sequence[int] | None = None) -> bytes:
    """Make the index of a shard: (offset, nbytes) of each inner chunk as little-endian uint64, then crc32c.

    Source: the Zarr v3 codec ``sharding_indexed``, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/

    Args:
        layout: the layout of the array.
        shard: the number of the shard.
        sizes: the bytes of each chunk that is present, in order; None if chunks are not compressed.
    """
    present = layout.chunks_in(shard)
    pairs = np.full((layout.chunks_per_shard, 2), MISSING, dtype="<u8")
    pairs[:present, 1] = layout.chunk_nbytes if sizes is None else sizes
    pairs[0, 0] = 0
    pairs[1:present, 0] = np.cumsum(pairs[: present - 1, 1], dtype=np.uint64)
    return indexed(pairs)


def indexed(pairs: NDArray[np.uint64]) -> bytes:
    """Make the index with these entries.

    Args:
        pairs: the offset and the bytes of each chunk, [chunks of a shard, 2].
    """
    encoded = pairs.astype("<u8", copy=False).tobytes()
    return encoded + struct.pack("<I", crc32c(encoded))


@dataclass(frozen=True)
class Shard:
    """A shard that is ready to be written."""

    key: str
    parts: tuple[Bytes, ...]
    """Chunks and index, written one after the other without joining them first."""
    nbytes: int
    crc32c: int
    """The checksum of all parts together, as the object is stored."""


def encode(layout: ArrayLayout, shard: int, rows: NDArray[Any]) -> Shard:
    """Make a shard of its rows. Uncompressed, the data is not copied; compressed, equal rows give equal bytes.

    Args:
        layout: the layout of the array.
        shard: the number of the shard.
        rows: the rows in the storage type, C-contiguous [rows, ...], padded to whole inner chunks:
            ``layout.chunks_in(shard) * layout.chunk_rows`` rows.
    """
    if rows.nbytes != layout.data_nbytes(shard) or not rows.flags.c_contiguous:
        raise ValueError(
            f"shard {shard} of {layout.path} needs {layout.data_nbytes(shard)} contiguous bytes, got {rows.nbytes}"
        )
    data = rows.reshape(-1).view(np.uint8)
    parts: tuple[Bytes, ...]
    if layout.compression is None:
        parts = (data, index(layout, shard))
    else:
        chunks = data.reshape(-1, layout.chunk_nbytes)
        frames = [compress(layout.compression, layout.itemsize, chunk) for chunk in chunks]
        parts = (*frames, index(layout, shard, [len(frame) for frame in frames]))
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return Shard(layout.key(shard), parts, sum(len(part) for part in parts), crc)


def crc32c(data: Bytes, crc: int = 0) -> int:
    """CRC-32C (Castagnoli), as in RFC 3720. Nothing is copied, and other threads run meanwhile.

    Args:
        data: the bytes.
        crc: the checksum of the bytes before them.
    """
    return int(_crc32c(view(data), crc))

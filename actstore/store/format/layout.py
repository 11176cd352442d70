"""Where every byte of a store lies: keys, shards and offsets, as pure arithmetic.

An array is split on its first axis only: shards of ``shard_rows`` rows, each made of inner chunks of
``chunk_rows`` rows. Uncompressed, a shard is then the C-order tensor followed by its index, and row ``r`` is at
byte ``(r % shard_rows) * row_nbytes`` of shard ``r // shard_rows``. Compressed, only the index knows where a chunk
is. `schemas/format.md` is the normative text.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from actstore.store.format.compression import OVERHEAD, Compression, check_chunk, codec
from actstore.store.format.dtypes import dtype

ROOT_METADATA: Final = "zarr.json"
PAGE: Final = 4096
"""Bytes. Shard data is a whole number of pages, so that shards can be mapped side by side."""


@dataclass(frozen=True)
class RowRange:
    """Rows ``start:stop`` of one shard, with their place in the array."""

    shard: int
    start: int
    """First row, counted within the shard."""
    n_rows: int
    first_row: int
    """The same row, counted within the array."""


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and sharding of one array below the root of a store."""

    path: str
    """Path below the root, such as ``acts/blocks.5.hook_resid_post``."""
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    """Name of each axis; becomes ``dimension_names``."""
    shard_rows: int
    chunk_rows: int
    compression: Compression | None = None
    """Of each inner chunk by itself; None stores the tensor as it lies in memory."""
    hooks: tuple[str, ...] = ()
    """Names of the entries of an axis of hooks, told in the attributes."""

    def __post_init__(self) -> None:
        if self.compression is not None:
            check_chunk(self.chunk_nbytes)

    @property
    def itemsize(self) -> int:
        return dtype(self.dtype).itemsize

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.shape[1:]) * self.itemsize

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of an inner chunk in memory."""
        return self.chunk_rows * self.row_nbytes

    @property
    def n_shards(self) -> int:
        return math.ceil(self.shape[0] / self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def index_nbytes(self) -> int:
        """An (offset, nbytes) pair of uint64 for each inner chunk, then a crc32c."""
        return 16 * self.chunks_per_shard + 4

    def key(self, shard: int) -> str:
        return f"{self.path}/c.{shard}" + ".0" * (len(self.shape) - 1)

    def rows_in(self, shard: int) -> int:
        """Rows of the array in this shard: ``shard_rows``, or fewer in the last one."""
        return min(self.shard_rows, self.shape[0] - shard * self.shard_rows)

    def chunks_in(self, shard: int) -> int:
        """Inner chunks that are present; those wholly past the end of the array are marked missing."""
        return math.ceil(self.rows_in(shard) / self.chunk_rows)

    def data_nbytes(self, shard: int) -> int:
        """Bytes of its chunks in memory, where the last one is padded to its full size.

        Uncompressed, these are the bytes before the index.
        """
        return self.chunks_in(shard) * self.chunk_nbytes

    def shard_nbytes(self, shard: int) -> int:
        """Size of the whole object.

        Raises:
            ValueError: the array is compressed, so that only the object itself can tell.
        """
        if self.compression is not None:
            raise ValueError(f"shards of {self.path} are compressed; their size follows from their values")
        return self.data_nbytes(shard) + self.index_nbytes

    def max_shard_nbytes(self, shard: int) -> int:
        """The most that the object can take: its size, where the array is not compressed."""
        overhead = OVERHEAD * self.chunks_in(shard) if self.compression is not None else 0
        return self.data_nbytes(shard) + overhead + self.index_nbytes

    @property
    def nbytes(self) -> int:
        """Size of all shards together; the most it can be, where the array is compressed."""
        last = self.n_shards - 1
        return last * self.max_shard_nbytes(0) + self.max_shard_nbytes(last) if self.n_shards else 0

    def split(self, start: int, stop: int) -> Iterator[RowRange]:
        """Cut rows ``start:stop`` of the array at shard borders."""
        row = start
        while row < stop:
            shard, within = divmod(row, self.shard_rows)
            n_rows = min(stop - row, self.shard_rows - within)
            yield RowRange(shard, within, n_rows, row)
            row += n_rows

    @property
    def metadata_key(self) -> str:
        return f"{self.path}/zarr.json"

    def metadata(self) -> dict[str, Any]:
        """The array's ``zarr.json`` (Zarr v3 with the ``sharding_indexed`` codec)."""
        inner = list(self.shape[1:])
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        compressor = [] if self.compression is None else [codec(self.compression, self.itemsize)]
        sharding = {
            "chunk_shape": [self.chunk_rows, *inner],
            "codecs": [little_endian, *compressor],
            "index_codecs": [little_endian, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *inner]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": dtype(self.dtype).fill_value,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": list(self.axes),
            "attributes": {"hooks": list(self.hooks)} if self.hooks else {},
        }


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """The root's ``zarr.json``."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def to_json(document: dict[str, Any]) -> bytes:
    """One spelling for every JSON document of a store, so that equal documents are equal bytes."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def chunk_rows(row_nbytes: int, *, target_nbytes: int) -> int:
    """Rows of an inner chunk: the smallest power of two that reaches ``target_nbytes``."""
    return 1 << max(0, math.ceil(math.log2(target_nbytes / row_nbytes)))


def page_rows(row_nbytes: int) -> int:
    """The smallest number of rows that fill whole pages."""
    return PAGE // math.gcd(PAGE, row_nbytes)


def segment_size(
    row_nbytes: Sequence[int],
    *,
    n_sequences: int,
    batch_size: int,
    shard_nbytes: int = 64 << 20,
    segment_nbytes: int = 1 << 30,
    min_segments: int = 16,
) -> int:
    """Sequences in a segment, the unit of work, of commit and of loss.

    The widest hook's shard comes near ``shard_nbytes``, all hooks together stay under ``segment_nbytes`` (a
    worker holds three segments in memory), and a small run still has about ``min_segments`` units to share out
    and to resume from. Always whole batches, whole inner chunks and whole pages.
    """
    step = segment_step(row_nbytes, batch_size=batch_size)
    wanted = min(shard_nbytes // max(row_nbytes), segment_nbytes // sum(row_nbytes))
    wanted = min(wanted, math.ceil(n_sequences / min_segments))
    return max(1, wanted // step) * step


def segment_step(row_nbytes: Sequence[int], *, batch_size: int) -> int:
    """What a segment's size must be a multiple of: whole batches and, for each hook, whole pages."""
    return math.lcm(batch_size, *(page_rows(n) for n in row_nbytes))


def dividing_chunk_rows(row_nbytes: int, shard_rows: int, *, target_nbytes: int = 1 << 20) -> int:
    """The inner chunk of ``chunk_rows``, made smaller where it must be to divide the shard."""
    return math.gcd(chunk_rows(row_nbytes, target_nbytes=target_nbytes), shard_rows)

"""The place of every byte of a store, computed: keys, shards and offsets.

An array is split along its first axis only, into shards of ``shard_rows`` rows, which consist of inner chunks of
``chunk_rows`` rows. An uncompressed shard is the C-order tensor followed by its index, and row ``r`` is at byte ``(r %
shard_rows) * row_nbytes`` of shard ``r // shard_rows``. In a compressed shard, only the index tells where a chunk is.
`schemas/format.md` is the normative text.
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
"""Bytes of a page. The data of a shard fills whole pages, so that shards can be mapped side by side."""


@dataclass(frozen=True)
class RowRange:
    """Rows ``start:stop`` of one shard, and their place in the array."""

    shard: int
    start: int
    """The first row, counted within the shard."""
    n_rows: int
    first_row: int
    """The first row, counted within the array."""


@dataclass(frozen=True)
class ArrayLayout:
    """The shape and sharding of one array below the root of a store."""

    path: str
    """Path below the root, such as ``acts/blocks.5.hook_resid_post``."""
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    """Names of the axes, stored as ``dimension_names``."""
    shard_rows: int
    chunk_rows: int
    compression: Compression | None = None
    """Compression of each inner chunk; None stores the tensor as it is in memory."""
    hooks: tuple[str, ...] = ()
    """Names of the entries on an axis of hooks, stored in the attributes."""

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
        """Bytes of an uncompressed inner chunk."""
        return self.chunk_rows * self.row_nbytes

    @property
    def n_shards(self) -> int:
        return math.ceil(self.shape[0] / self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def index_nbytes(self) -> int:
        """Bytes of the index: a pair (offset, nbytes) of uint64 for each inner chunk, and a crc32c."""
        return 16 * self.chunks_per_shard + 4

    def key(self, shard: int) -> str:
        return f"{self.path}/c.{shard}" + ".0" * (len(self.shape) - 1)

    def rows_in(self, shard: int) -> int:
        """Number of rows of the array in this shard: ``shard_rows``, or fewer in the last one."""
        return min(self.shard_rows, self.shape[0] - shard * self.shard_rows)

    def chunks_in(self, shard: int) -> int:
        """Number of inner chunks that are present; those wholly past the end of the array are marked missing."""
        return math.ceil(self.rows_in(shard) / self.chunk_rows)

    def data_nbytes(self, shard: int) -> int:
        """Bytes of the uncompressed chunks of a shard, with the last one padded to its full size.

        In an uncompressed shard, these are the bytes before the index.
        """
        return self.chunks_in(shard) * self.chunk_nbytes

    def shard_nbytes(self, shard: int) -> int:
        """Bytes of the whole object of a shard.

        Raises:
            ValueError: the array is compressed, so the size depends on the values.
        """
        if self.compression is not None:
            raise ValueError(f"shards of {self.path} are compressed; their size follows from their values")
        return self.data_nbytes(shard) + self.index_nbytes

    def max_shard_nbytes(self, shard: int) -> int:
        """The most bytes that the object can have; its exact size if the array is not compressed."""
        overhead = OVERHEAD * self.chunks_in(shard) if self.compression is not None else 0
        return self.data_nbytes(shard) + overhead + self.index_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together; the most that they can have if the array is compressed."""
        last = self.n_shards - 1
        return last * self.max_shard_nbytes(0) + self.max_shard_nbytes(last) if self.n_shards else 0

    def split(self, start: int, stop: int) -> Iterator[RowRange]:
        """Split rows ``start:stop`` of the array at the borders of shards."""
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
    """The ``zarr.json`` of the root group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def to_json(document: dict[str, Any]) -> bytes:
    """Serialise a JSON document canonically, so that equal documents give equal bytes."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def chunk_rows(row_nbytes: int, *, target_nbytes: int) -> int:
    """Number of rows of an inner chunk: the smallest power of two that reaches ``target_nbytes``."""
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
    most_sequences: int | None = None,
    least_batches: int = 1,
) -> int:
    """Number of sequences in a segment, the unit of work, of commit and of loss.

    The widest hook's shard is close to ``shard_nbytes``, all hooks together stay under ``segment_nbytes`` (a worker
    holds three segments in memory), and a small run still has about ``min_segments`` units to distribute and to resume
    from. A segment consists of whole batches, whole inner chunks and whole pages.

    Args:
        row_nbytes: bytes of a sequence of each hook.
        n_sequences: sequences of the run.
        batch_size: sequences of a batch.
        shard_nbytes, segment_nbytes: about the most bytes of a shard, and of all of a segment.
        min_segments: about the least number of segments.
        most_sequences: about the most sequences, however few bytes they have; None for no limit.
        least_batches: batches that a segment should have, even if there are fewer than ``min_segments`` segments then.
    """
    step = segment_step(row_nbytes, batch_size=batch_size)
    wanted = min(shard_nbytes // max(row_nbytes), segment_nbytes // sum(row_nbytes))
    if most_sequences is not None:
        wanted = min(wanted, most_sequences)
    wanted = min(wanted, max(math.ceil(n_sequences / min_segments), least_batches * batch_size))
    if wanted > n_sequences:
        return math.ceil(n_sequences / step) * step
    return max(1, wanted // step) * step


def segment_step(row_nbytes: Sequence[int], *, batch_size: int) -> int:
    """The number that a segment's size must be a multiple of: whole batches and, for each hook, whole pages."""
    return math.lcm(batch_size, *(page_rows(n) for n in row_nbytes))


def dividing_chunk_rows(row_nbytes: int, shard_rows: int, *, target_nbytes: int = 1 << 20) -> int:
    """The number of rows given by ``chunk_rows``, made smaller if needed to divide the shard."""
    return math.gcd(chunk_rows(row_nbytes, target_nbytes=target_nbytes), shard_rows)

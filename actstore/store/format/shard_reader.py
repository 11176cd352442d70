"""Reading a shard through its index, which is checked before it is used."""

import struct
import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.storage.blobs import BlobReader, Bytes
from actstore.storage.errors import BlobNotFoundError
from actstore.store.format.compression import OVERHEAD, decompress
from actstore.store.format.dtypes import dtype
from actstore.store.format.layout import ArrayLayout, RowRange
from actstore.store.format.shard import CRC_NBYTES, MISSING, crc32c, index

_MAX_INDICES: Final = 1024
"""Number of indices that are kept, about a megabyte."""

Pairs = NDArray[np.uint64]
"""The offset and the bytes of each inner chunk, [chunks of a shard, 2]."""
OnRead = Callable[[int, Bytes], None]


def read_index(blobs: BlobReader, layout: ArrayLayout, shard: int, nbytes: int) -> Pairs:
    """Read and check the index of a shard.

    Args:
        blobs: the storage of the store.
        layout: the layout of the array.
        shard: the number of the shard.
        nbytes: the size of the object.

    Raises:
        BlobNotFoundError: there is no such shard.
        StorageError: the index is damaged, or contradicts the layout.
    """
    where = f"{blobs.url}/{layout.key(shard)}"
    _check_size(layout, shard, nbytes, where)
    start = nbytes - layout.index_nbytes
    return _parsed(layout, shard, start, blobs.read(layout.key(shard), start, layout.index_nbytes), where)


def check_index(layout: ArrayLayout, shard: int, data: Bytes) -> Pairs:
    """Check the index of a shard that is in memory as a whole.

    Raises:
        StorageError: the index is damaged, or contradicts the layout.
    """
    where = layout.key(shard)
    _check_size(layout, shard, len(data), where)
    start = len(data) - layout.index_nbytes
    return _parsed(layout, shard, start, data[start:], where)


def decode(layout: ArrayLayout, shard: int, data: Bytes) -> NDArray[Any]:
    """Decode the rows of a shard that is in memory as a whole, without padding. Uncompressed rows are not copied.

    Raises:
        StorageError: the index or a chunk is damaged.
    """
    pairs = check_index(layout, shard, data)
    whole = np.frombuffer(data, np.uint8)
    if layout.compression is None:
        values = whole[: layout.data_nbytes(shard)]
    else:
        values = np.empty(layout.data_nbytes(shard), np.uint8)
        for chunk, out in enumerate(values.reshape(-1, layout.chunk_nbytes)):
            start, nbytes = (int(n) for n in pairs[chunk])
            decompress(whole[start : start + nbytes], layout.itemsize, out, _chunk(layout.key(shard), chunk))
    rows = values.view(dtype(layout.dtype).storage).reshape(-1, *layout.shape[1:])
    return rows[: layout.rows_in(shard)]


def _chunk(where: str, chunk: int) -> str:
    return f"{where} (inner chunk {chunk})"


def _check_size(layout: ArrayLayout, shard: int, nbytes: int, where: str) -> None:
    most = layout.max_shard_nbytes(shard)
    least = most if layout.compression is None else layout.index_nbytes
    if not least <= nbytes <= most:
        expected = f"{most}" if least == most else f"{least} to {most}"
        raise StorageError(f"{where} is damaged: it has {nbytes} bytes where {expected} are expected")


def _parsed(layout: ArrayLayout, shard: int, end: int, tail: Bytes, where: str) -> Pairs:
    """Parse and check the index that begins at byte ``end``."""
    encoded = bytes(tail)
    checksum, expected = crc32c(encoded[:-CRC_NBYTES]), struct.unpack("<I", encoded[-CRC_NBYTES:])[0]
    if checksum != expected:
        raise StorageError(f"{where} is damaged: its index has crc32c {checksum} where {expected} is stored")
    pairs: Pairs = np.frombuffer(encoded[:-CRC_NBYTES], dtype="<u8").reshape(-1, 2)
    if layout.compression is None:
        # Rows are located by arithmetic alone, so the index has to agree with it.
        right = np.frombuffer(index(layout, shard)[:-CRC_NBYTES], dtype="<u8").reshape(-1, 2)
        wrong = (pairs != right).any(axis=1)
    else:
        offset, nbytes = pairs.T
        is_frame = (nbytes > OVERHEAD) & (nbytes <= layout.chunk_nbytes + OVERHEAD)
        # Compared without a sum, which could overflow.
        is_inside = (offset <= end) & (nbytes <= end) & (offset <= np.uint64(end) - np.minimum(nbytes, end))
        is_there = np.arange(len(pairs)) < layout.chunks_in(shard)
        wrong = np.where(is_there, ~(is_frame & is_inside), (pairs != MISSING).any(axis=1))
    if wrong.any():
        chunk = int(np.argmax(wrong))
        raise StorageError(
            f"{where} is damaged: its index has {tuple(map(int, pairs[chunk]))} as (offset, bytes) of inner chunk "
            f"{chunk}, which cannot be: {end} bytes are before the index, and {layout.chunks_in(shard)} chunks of "
            f"{layout.chunk_nbytes} bytes are in the shard"
        )
    return pairs


class CompressedShards:
    """The compressed shards of one array. Threads may share an instance."""

    def __init__(
        self, blobs: BlobReader, layout: ArrayLayout, nbytes_of: Callable[[int], int] | None
    ) -> None:
        self._blobs = blobs
        self._layout = layout
        self._nbytes_of = nbytes_of
        self._indices: dict[int, Pairs] = {}
        self._lock = threading.Lock()

    def read_into(self, part: RowRange, out: NDArray[np.uint8], on_read: OnRead | None = None) -> None:
        """Read some rows of a shard into ``out``.

        Args:
            part: the rows to read.
            out: contiguous memory of ``part.n_rows * row_nbytes`` bytes.
            on_read: called with the first byte and the content of each read of the object.

        Raises:
            BlobNotFoundError: there is no such shard.
            StorageError: the shard is damaged or cannot be read.
        """
        layout = self._layout
        pairs = self.index(part.shard)
        stop = part.start + part.n_rows
        first, last = part.start // layout.chunk_rows, (stop - 1) // layout.chunk_rows
        frames = self._frames(part.shard, pairs, first, last, on_read)
        chunk_buffer: NDArray[np.uint8] | None = None
        for chunk in range(first, last + 1):
            chunk_start = chunk * layout.chunk_rows
            start_row, stop_row = max(part.start, chunk_start), min(stop, chunk_start + layout.chunk_rows)
            begin = (start_row - part.start) * layout.row_nbytes
            wanted = out[begin : begin + (stop_row - start_row) * layout.row_nbytes]
            where = _chunk(f"{self._blobs.url}/{layout.key(part.shard)}", chunk)
            if wanted.nbytes == layout.chunk_nbytes:
                decompress(frames[chunk - first], layout.itemsize, wanted, where)
                continue
            if chunk_buffer is None:
                chunk_buffer = np.empty(layout.chunk_nbytes, np.uint8)
            decompress(frames[chunk - first], layout.itemsize, chunk_buffer, where)
            within = (start_row - chunk_start) * layout.row_nbytes
            wanted[:] = chunk_buffer[within : within + wanted.nbytes]

    def _frames(
        self, shard: int, pairs: Pairs, first: int, last: int, on_read: OnRead | None
    ) -> list[NDArray[np.uint8]]:
        """The frames of chunks ``first`` to ``last``, in one read if they are consecutive."""
        offsets = [int(offset) for offset in pairs[first : last + 1, 0]]
        sizes = [int(nbytes) for nbytes in pairs[first : last + 1, 1]]
        key = self._layout.key(shard)

        def read(start: int, nbytes: int) -> NDArray[np.uint8]:
            data = np.frombuffer(self._blobs.read(key, start, nbytes), np.uint8)
            if on_read is not None:
                on_read(start, data)
            return data

        if all(offsets[i] + sizes[i] == offsets[i + 1] for i in range(len(offsets) - 1)):
            together = read(offsets[0], sum(sizes))
            return [
                together[offset - offsets[0] :][:nbytes]
                for offset, nbytes in zip(offsets, sizes, strict=True)
            ]
        return [read(offset, nbytes) for offset, nbytes in zip(offsets, sizes, strict=True)]

    def index(self, shard: int) -> Pairs:
        """The index of a shard. It is read once, since a shard never changes.

        Raises:
            BlobNotFoundError: there is no such shard.
            StorageError: the index is damaged or cannot be read.
        """
        pairs = self._indices.get(shard)
        if pairs is None:
            pairs = read_index(self._blobs, self._layout, shard, self._nbytes(shard))
            with self._lock:
                if len(self._indices) >= _MAX_INDICES:
                    self._indices.pop(next(iter(self._indices)))
                self._indices[shard] = pairs
        return pairs

    def _nbytes(self, shard: int) -> int:
        if self._nbytes_of is not None:
            return self._nbytes_of(shard)
        key = self._layout.key(shard)
        info = self._blobs.head(key)
        if info is None:
            raise BlobNotFoundError(f"{self._blobs.url}/{key} does not exist")
        return info.nbytes

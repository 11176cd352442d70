"""Reading shards through their index: every damage of it is reported, even with a right checksum."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.storage.local import LocalBlobs
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import MISSING, crc32c, index
from actstore.store.format.shard_reader import check_index, decode, read_index
from actstore.store.reading.rows import Rows, Section
from tests.store.arrays import bits, encoded, random_bits, write_array

# The last of three shards has two of its four inner chunks.
PLAIN = ArrayLayout("acts/h", (37, 8, 6), "bfloat16", ("sequence", "position", "d_model"), 16, 4)
LZ4 = dataclasses.replace(PLAIN, compression="lz4")
ZSTD = dataclasses.replace(PLAIN, compression="zstd")
VALUES = random_bits(PLAIN) & 0x7F0F
EACH = pytest.mark.parametrize("layout", [PLAIN, LZ4, ZSTD], ids=["plain", "lz4", "zstd"])
COMPRESSED = pytest.mark.parametrize("layout", [LZ4, ZSTD], ids=["lz4", "zstd"])


def whole(layout: ArrayLayout, shard: int) -> bytes:
    return b"".join(bytes(part) for part in encoded(layout, shard, VALUES).parts)


def with_pairs(layout: ArrayLayout, data: bytes, changes: dict[tuple[int, int], int]) -> bytes:
    """The shard with other numbers in its index, and the right checksum for them."""
    pairs = np.frombuffer(data[-layout.index_nbytes : -4], "<u8").reshape(-1, 2).copy()
    for place, value in changes.items():
        pairs[place] = value
    encoded = pairs.tobytes()
    return data[: -layout.index_nbytes] + encoded + struct.pack("<I", crc32c(encoded))


def rows_of(tmp_path: Path, layout: ArrayLayout, data: bytes, shard: int) -> Rows:
    blobs = LocalBlobs(tmp_path)
    blobs.delete(layout.key(shard))
    assert blobs.create(layout.key(shard), [data])
    return Rows(blobs, [Section(layout, lambda _: True)])


@EACH
@pytest.mark.parametrize("shard", [0, 1, 2])
def test_rows_of_a_shard(layout: ArrayLayout, shard: int) -> None:
    rows = decode(layout, shard, whole(layout, shard))
    assert rows.dtype == np.dtype("<u2")
    assert np.array_equal(rows, VALUES[shard * 16 : shard * 16 + 16])


@EACH
@pytest.mark.parametrize("shard", [0, 2])
def test_index_from_storage_is_that_in_memory(tmp_path: Path, layout: ArrayLayout, shard: int) -> None:
    blobs = LocalBlobs(tmp_path)
    write_array(blobs, layout, VALUES)
    data = whole(layout, shard)
    pairs = read_index(blobs, layout, shard, len(data))
    assert np.array_equal(pairs, check_index(layout, shard, data))
    assert pairs[layout.chunks_in(shard) - 1].sum() == len(data) - layout.index_nbytes
    if layout is PLAIN:
        assert pairs.tobytes() == index(layout, shard)[:-4]


@EACH
def test_every_flip_in_the_index_is_found(layout: ArrayLayout) -> None:
    data = whole(layout, 2)
    for bit in range(8 * layout.index_nbytes):
        bad = bytearray(data)
        bad[len(bad) - 1 - bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(StorageError, match=r"acts/h/c\.2\.0\.0 is damaged: its index has crc32c"):
            check_index(layout, 2, bytes(bad))


HOSTILE = {
    "past the end": {(0, 0): 10_000},
    "far past the end": {(1, 0): 2**63},
    "wraps around": {(1, 0): 2**64 - 20, (1, 1): 40},
    "nothing": {(0, 1): 0},
    "less than a header": {(0, 1): 12},
    "more than a chunk": {(0, 1): PLAIN.chunk_nbytes + 17},
    "as large as memory": {(0, 1): 2**40},
    "not there": {(1, 0): MISSING, (1, 1): MISSING},
    "half there": {(1, 1): MISSING},
    "one too many": {(2, 0): 0, (2, 1): PLAIN.chunk_nbytes},
    "half of one too many": {(3, 0): 0},
}


@EACH
@pytest.mark.parametrize("name", HOSTILE)
def test_index_that_cannot_be_is_refused(tmp_path: Path, layout: ArrayLayout, name: str) -> None:
    bad = with_pairs(layout, whole(layout, 2), HOSTILE[name])
    chunk = next(iter(HOSTILE[name]))[0]
    words = rf"acts/h/c\.2\.0\.0 is damaged: its index has \(.*\) as \(offset, bytes\) of inner chunk {chunk}"
    with pytest.raises(StorageError, match=words):
        check_index(layout, 2, bad)
    if layout.compression is not None:
        with pytest.raises(StorageError, match=words):
            rows_of(tmp_path, layout, bad, 2)[32:37]


@COMPRESSED
def test_chunk_may_not_reach_into_the_index(layout: ArrayLayout) -> None:
    data = whole(layout, 2)
    last = check_index(layout, 2, data)[1]
    with pytest.raises(StorageError, match="of inner chunk 1, which cannot be"):
        check_index(layout, 2, with_pairs(layout, data, {(1, 0): int(last[0]) + 1}))


def test_order_of_chunks_is_fixed_when_rows_are_found_by_arithmetic() -> None:
    data = whole(PLAIN, 0)
    swapped = with_pairs(PLAIN, data, {(0, 0): PLAIN.chunk_nbytes, (1, 0): 0})
    with pytest.raises(StorageError, match="of inner chunk 0, which cannot be"):
        check_index(PLAIN, 0, swapped)


@COMPRESSED
def test_compressed_chunks_may_lie_in_any_order(tmp_path: Path, layout: ArrayLayout) -> None:
    data = whole(layout, 0)
    pairs = check_index(layout, 0, data)
    frames = [data[int(offset) : int(offset + nbytes)] for offset, nbytes in pairs]
    changes, at = {}, 0
    for chunk in (2, 0, 3, 1):
        changes[chunk, 0] = at
        at += len(frames[chunk])
    turned = b"".join(frames[chunk] for chunk in (2, 0, 3, 1)) + data[-layout.index_nbytes :]
    turned = with_pairs(layout, turned, changes)
    assert np.array_equal(decode(layout, 0, turned), VALUES[:16])
    assert np.array_equal(rows_of(tmp_path, layout, turned, 0)[2:15], VALUES[2:15])


@EACH
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_damage(tmp_path: Path, layout: ArrayLayout, change: int) -> None:
    data = whole(layout, 0)
    bad = data[:change] if change < 0 else data + b"\0"
    with pytest.raises(StorageError, match="is damaged"):
        check_index(layout, 0, bad)
    blobs = LocalBlobs(tmp_path)
    assert blobs.create(layout.key(0), [bad])
    with pytest.raises(StorageError, match="is damaged"):
        read_index(blobs, layout, 0, len(bad))


@pytest.mark.parametrize("nbytes", [0, 3, LZ4.index_nbytes - 1, 10**6])
def test_size_out_of_reach_is_refused_before_reading(tmp_path: Path, nbytes: int) -> None:
    most = LZ4.max_shard_nbytes(0)
    with pytest.raises(StorageError, match=f"it has {nbytes} bytes where 68 to {most} are expected"):
        read_index(LocalBlobs(tmp_path), LZ4, 0, nbytes)


@COMPRESSED
def test_damaged_chunk_is_named(tmp_path: Path, layout: ArrayLayout) -> None:
    data = bytearray(whole(layout, 1))
    start = int(check_index(layout, 1, bytes(data))[2, 0])
    data[start + 4] ^= 1  # the size in its header
    words = r"acts/h/c\.1\.0\.0 \(inner chunk 2\) is damaged: its header says"
    with pytest.raises(StorageError, match=words):
        decode(layout, 1, bytes(data))
    rows = rows_of(tmp_path, layout, bytes(data), 1)
    with pytest.raises(StorageError, match=words):
        rows[16:32]
    assert np.array_equal(bits(rows[16:24]), VALUES[16:24])


@COMPRESSED
def test_every_flip_in_a_chunk_is_told_or_changes_values_only(layout: ArrayLayout) -> None:
    data = whole(layout, 0)
    first: NDArray[np.uint64] = check_index(layout, 0, data)[0]
    messages = []
    for bit in range(0, 8 * int(first[1]), 3):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << (bit % 8)
        assert crc32c(bytes(bad)) != crc32c(data)
        try:
            rows = decode(layout, 0, bytes(bad))
        except StorageError as error:
            messages.append(str(error))
        else:
            assert np.array_equal(rows[4:], VALUES[4:16])
    assert len(messages) > 20
    assert all("(inner chunk 0) is damaged" in sentence for sentence in messages)

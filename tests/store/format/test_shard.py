"""The bytes of a shard, parsed by hand according to the Zarr v3 specification."""

import dataclasses
import struct
import tracemalloc

import google_crc32c
import numpy as np
import pytest

from actstore.store.format.compression import OVERHEAD, Compression, decompress
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import MISSING, crc32c, encode, index

LAYOUT = ArrayLayout("acts/h", (37, 8, 16), "float32", ("sequence", "position", "d_model"), 16, 4)
CHUNK = 4 * 8 * 16 * 4


def test_crc_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's polynomial


@pytest.mark.parametrize("nbytes", [0, 1, 4 << 20, (4 << 20) + 1, (9 << 20) + 5])
def test_crc_in_pieces_is_the_crc(nbytes: int) -> None:
    data = np.random.default_rng(0).bytes(nbytes)
    assert crc32c(data) == google_crc32c.value(data)
    assert crc32c(np.frombuffer(data, np.uint8), 5) == google_crc32c.extend(5, data) == crc32c(data, 5)


def test_crc_copies_nothing() -> None:
    data = np.zeros(16 << 20, np.uint8)
    tracemalloc.start()
    try:
        crc32c(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_index_of_a_full_shard() -> None:
    *pairs, crc = struct.unpack("<8QI", index(LAYOUT, 0))
    assert pairs == [0, CHUNK, CHUNK, CHUNK, 2 * CHUNK, CHUNK, 3 * CHUNK, CHUNK]
    assert crc == crc32c(index(LAYOUT, 0)[:-4])


def test_chunks_past_the_end_are_marked_missing() -> None:
    *pairs, crc = struct.unpack("<8QI", index(LAYOUT, 2))
    assert pairs == [0, CHUNK, CHUNK, CHUNK, MISSING, MISSING, MISSING, MISSING]
    assert crc == crc32c(index(LAYOUT, 2)[:-4])


@pytest.mark.parametrize(("shard", "n_rows"), [(0, 16), (2, 8)])
def test_shard_is_the_tensor_then_the_index(shard: int, n_rows: int) -> None:
    rows = np.random.default_rng(0).standard_normal((n_rows, 8, 16), dtype=np.float32)
    made = encode(LAYOUT, shard, rows)
    whole = b"".join(bytes(part) for part in made.parts)
    assert whole == rows.tobytes() + index(LAYOUT, shard)
    assert made.key == LAYOUT.key(shard)
    assert made.nbytes == len(whole) == LAYOUT.shard_nbytes(shard)
    assert made.crc32c == crc32c(whole)


def test_rows_are_not_copied() -> None:
    rows = np.zeros((16, 8, 16), dtype=np.float32)
    data = encode(LAYOUT, 0, rows).parts[0]
    assert isinstance(data, np.ndarray)
    assert np.shares_memory(data, rows)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(np.zeros((15, 8, 16), dtype=np.float32), id="too few"),
        pytest.param(np.zeros((17, 8, 16), dtype=np.float32), id="too many"),
        pytest.param(np.zeros((16, 16, 8), dtype=np.float32).transpose(0, 2, 1), id="not contiguous"),
        pytest.param(np.zeros((16, 8, 16), dtype=np.float64), id="too wide"),
    ],
)
def test_other_rows_than_planned_are_refused(rows: "np.typing.NDArray[np.float32]") -> None:
    with pytest.raises(ValueError, match=f"shard 0 of acts/h needs {4 * CHUNK} contiguous bytes"):
        encode(LAYOUT, 0, rows)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize(("shard", "n_rows"), [(0, 16), (2, 8)])
def test_compressed_shard_is_frames_then_the_index(compression: Compression, shard: int, n_rows: int) -> None:
    layout = dataclasses.replace(LAYOUT, compression=compression)
    rows = np.zeros((n_rows, 8, 16), dtype=np.float32)
    rows[::3] = np.random.default_rng(0).standard_normal((8, 16))
    made = encode(layout, shard, rows)
    whole = b"".join(bytes(part) for part in made.parts)
    assert (made.nbytes, made.crc32c) == (len(whole), crc32c(whole))
    assert made.nbytes < layout.max_shard_nbytes(shard)
    *numbers, crc = struct.unpack("<8QI", whole[-layout.index_nbytes :])
    assert crc == crc32c(whole[-layout.index_nbytes : -4])
    end, pairs = 0, list(zip(numbers[::2], numbers[1::2], strict=True))
    for chunk, (offset, nbytes) in enumerate(pairs[: n_rows // 4]):
        assert offset == end
        out = np.empty(CHUNK, np.uint8)
        decompress(np.frombuffer(whole[offset : offset + nbytes], np.uint8), 4, out, "a")
        assert out.tobytes() == rows[4 * chunk : 4 * chunk + 4].tobytes()
        end += nbytes
    assert end == len(whole) - layout.index_nbytes
    assert set(pairs[n_rows // 4 :]) <= {(MISSING, MISSING)}


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_what_cannot_be_compressed_keeps_to_the_limit(compression: Compression) -> None:
    layout = dataclasses.replace(LAYOUT, compression=compression)
    rows = np.random.default_rng(0).integers(0, 256, (16, 8, 64), dtype=np.uint8)
    assert encode(layout, 0, rows).nbytes <= layout.max_shard_nbytes(0)
    assert layout.max_shard_nbytes(0) == LAYOUT.shard_nbytes(0) + 4 * OVERHEAD

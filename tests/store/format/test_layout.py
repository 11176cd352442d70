"""The arithmetic of layouts, compared with numbers worked out by hand, and by general properties."""

import dataclasses
import itertools
import json
import math

import pytest

from actstore.store.format.compression import Compression
from actstore.store.format.dtypes import dtype
from actstore.store.format.layout import (
    PAGE,
    ArrayLayout,
    chunk_rows,
    dividing_chunk_rows,
    page_rows,
    segment_size,
    segment_step,
    to_json,
)

# 37 rows of 8 x 16 x 2 bytes = 256 bytes; shards of 16 rows, inner chunks of 4.
LAYOUT = ArrayLayout("acts/h", (37, 8, 16), "bfloat16", ("sequence", "position", "d_model"), 16, 4)


def test_numbers_by_hand() -> None:
    assert LAYOUT.row_nbytes == 256
    assert LAYOUT.n_shards == 3
    assert LAYOUT.chunks_per_shard == 4
    assert LAYOUT.index_nbytes == 4 * 16 + 4
    assert [LAYOUT.rows_in(i) for i in range(3)] == [16, 16, 5]
    assert [LAYOUT.chunks_in(i) for i in range(3)] == [4, 4, 2]
    assert [LAYOUT.data_nbytes(i) for i in range(3)] == [4096, 4096, 2048]
    assert [LAYOUT.shard_nbytes(i) for i in range(3)] == [4164, 4164, 2116]
    assert [LAYOUT.max_shard_nbytes(i) for i in range(3)] == [4164, 4164, 2116]
    assert LAYOUT.nbytes == 4164 + 4164 + 2116
    assert LAYOUT.key(2) == "acts/h/c.2.0.0"
    assert LAYOUT.metadata_key == "acts/h/zarr.json"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_size_of_compressed_shards_has_a_limit(compression: Compression) -> None:
    layout = dataclasses.replace(LAYOUT, compression=compression)
    assert [layout.data_nbytes(i) for i in range(3)] == [4096, 4096, 2048]
    assert [layout.max_shard_nbytes(i) for i in range(3)] == [4164 + 4 * 16, 4164 + 4 * 16, 2116 + 2 * 16]
    assert layout.nbytes == sum(layout.max_shard_nbytes(i) for i in range(3))
    with pytest.raises(ValueError, match="shards of acts/h are compressed; their size follows"):
        layout.shard_nbytes(0)


def test_key_has_one_number_an_axis() -> None:
    assert ArrayLayout("lengths", (5,), "int32", ("sequence",), 4, 2).key(1) == "lengths/c.1"


@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 32, 33])
def test_last_shard_holds_what_is_left(n_rows: int) -> None:
    layout = ArrayLayout("a", (n_rows, 8), "float32", ("sequence", "position"), 16, 4)
    assert sum(layout.rows_in(i) for i in range(layout.n_shards)) == n_rows
    assert 1 <= layout.rows_in(layout.n_shards - 1) <= 16
    assert layout.nbytes == sum(layout.shard_nbytes(i) for i in range(layout.n_shards))


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 37), (0, 0), (5, 5), (15, 17), (16, 32), (3, 4), (36, 37), (1, 36)]
)
def test_split_cuts_at_shard_borders_and_loses_no_row(start: int, stop: int) -> None:
    parts = list(LAYOUT.split(start, stop))
    rows = [part.shard * 16 + part.start + i for part in parts for i in range(part.n_rows)]
    assert rows == list(range(start, stop))
    assert all(part.first_row == part.shard * 16 + part.start for part in parts)
    assert all(part.n_rows > 0 and part.start + part.n_rows <= 16 for part in parts)
    assert len({part.shard for part in parts}) == len(parts)


@pytest.mark.parametrize("row_nbytes", [1, 3, 4096, 4097, 65_536, 1 << 20, (1 << 20) - 1, 5 << 20])
def test_inner_chunk_is_the_smallest_power_of_two_that_reaches_the_target(row_nbytes: int) -> None:
    rows = chunk_rows(row_nbytes, target_nbytes=1 << 20)
    assert rows & (rows - 1) == 0
    assert rows * row_nbytes >= 1 << 20
    assert rows == 1 or (rows // 2) * row_nbytes < 1 << 20


@pytest.mark.parametrize(("row_nbytes", "shard_rows"), [(65_536, 24), (65_536, 7), (256, 48), (1 << 21, 5)])
def test_inner_chunk_divides_the_shard(row_nbytes: int, shard_rows: int) -> None:
    assert shard_rows % dividing_chunk_rows(row_nbytes, shard_rows) == 0


@pytest.mark.parametrize(
    ("row_nbytes", "rows"), [(4096, 1), (8192, 1), (2048, 2), (6144, 2), (1, 4096), (4098, 2048), (12_288, 1)]
)
def test_page_rows_by_hand(row_nbytes: int, rows: int) -> None:
    assert page_rows(row_nbytes) == rows


D_MODELS = (64, 100, 576, 768, 2048, 2304, 4096, 4097)
LENGTHS = (1, 32, 127, 128, 1024, 4096)
BATCHES = (1, 8, 12, 32)


@pytest.mark.parametrize(("d_model", "length", "batch"), list(itertools.product(D_MODELS, LENGTHS, BATCHES)))
def test_segments_are_whole_batches_chunks_and_pages(d_model: int, length: int, batch: int) -> None:
    for name, n_hooks, n_sequences in itertools.product(("bfloat16", "float32"), (1, 12), (50, 1_000_000)):
        width = length * dtype(name).itemsize
        row_nbytes = [d_model * width] * n_hooks + [4 * d_model * width]  # and the hidden layer of an MLP
        size = segment_size(row_nbytes, n_sequences=n_sequences, batch_size=batch)
        step = segment_step(row_nbytes, batch_size=batch)
        assert size % batch == 0
        assert all(size * nbytes % PAGE == 0 for nbytes in row_nbytes)
        assert all(size % dividing_chunk_rows(nbytes, size) == 0 for nbytes in row_nbytes)
        # One step is the minimum; larger segments must stay within the limits.
        if size > step:
            assert size * max(row_nbytes) <= 64 << 20
            assert size * sum(row_nbytes) <= 1 << 30
            assert size <= math.ceil(n_sequences / 16)


def test_segment_comes_near_its_limit() -> None:
    row_nbytes = [128 * 2048 * 2]
    size = segment_size(row_nbytes, n_sequences=1_000_000, batch_size=32)
    assert size * row_nbytes[0] == 64 << 20


def test_many_hooks_share_the_segment() -> None:
    row_nbytes = [128 * 2048 * 2] * 64
    size = segment_size(row_nbytes, n_sequences=1_000_000, batch_size=32)
    assert size * sum(row_nbytes) == 1 << 30


def test_equal_documents_are_equal_bytes() -> None:
    assert to_json({"b": 1, "a": [1, 2]}) == to_json({"a": [1, 2], "b": 1})
    assert json.loads(to_json(LAYOUT.metadata())) == LAYOUT.metadata()

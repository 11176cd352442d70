"""Shards and rows of arrays of any shape, against NumPy, zarr-python and tensorstore."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

import actstore.store.format.bfloat16  # noqa: F401 - registers the type
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.store.format.compression import Compression
from actstore.store.format.dtypes import dtype as dtype_of
from actstore.store.format.layout import ArrayLayout, to_json
from actstore.store.format.shard import crc32c
from actstore.store.format.shard_reader import decode, read_index
from actstore.store.reading.rows import Rows, Section
from tests.store.arrays import bits, encoded

DTYPES = ("bfloat16", "float16", "float32", "int32", "int64")
AXES = ("sequence", "position", "head", "d_head")
COMPRESSIONS: tuple[Compression | None, ...] = (None, "lz4", "zstd")

bounded = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,  # the same arrays in every run
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def layouts(draw: st.DrawFn, path: str = "acts/h", inner: tuple[int, ...] | None = None) -> ArrayLayout:
    """Any number of rows, shards that they fill or not, and chunks that divide a shard."""
    if inner is None:
        inner = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    chunk_rows = draw(st.integers(1, 5))
    return ArrayLayout(
        path=path,
        shape=(draw(st.integers(1, 40)), *inner),
        dtype=draw(st.sampled_from(DTYPES)),
        axes=AXES[: 1 + len(inner)],
        shard_rows=chunk_rows * draw(st.integers(1, 5)),
        chunk_rows=chunk_rows,
        compression=draw(st.sampled_from(COMPRESSIONS)),
    )


def values_of(layout: ArrayLayout, seed: int) -> NDArray[Any]:
    """Any bits, in a third of them few different ones, which compress."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256 if seed % 3 else 2, layout.shape[0] * layout.row_nbytes, dtype=np.uint8)
    return data.view(dtype_of(layout.dtype).storage).reshape(layout.shape)


@contextmanager
def stored(*arrays: tuple[ArrayLayout, NDArray[Any]]) -> Iterator[LocalBlobs]:
    """Files of these arrays. They are not synced, which would take most of the time."""
    with tempfile.TemporaryDirectory() as folder:
        for layout, values in arrays:
            path = Path(folder, layout.metadata_key)
            path.parent.mkdir(parents=True)
            path.write_bytes(to_json(layout.metadata()))
            for shard in range(layout.n_shards):
                made = encoded(layout, shard, values)
                Path(folder, made.key).write_bytes(b"".join(bytes(part) for part in made.parts))
        yield LocalBlobs(folder)


def rows_of(blobs: Blobs, *layouts: ArrayLayout) -> Rows:
    return Rows(blobs, [Section(layout, lambda _: True) for layout in layouts])


def keys(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Anything that `Rows` takes as an index."""
    bounds = st.none() | st.integers(-shape[0] - 2, shape[0] + 2)
    steps = st.sampled_from([None, 1, 2, 3, 7, -1, -2, -5])
    row = st.integers(-shape[0], shape[0] - 1)
    first = st.one_of(
        row,
        st.builds(slice, bounds, bounds, steps),
        st.lists(row, min_size=1, max_size=30).map(np.array),
        st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]).map(np.array),
    )
    others = [st.integers(-n, n - 1) | st.slices(n) | st.just(slice(None)) for n in shape[1:]]
    n_others = st.integers(0, len(others))
    return st.tuples(first, n_others, st.tuples(*others)).map(lambda key: (key[0], *key[2][: key[1]]))


@bounded
@given(layouts(), st.integers(0, 99), st.data())
def test_shards_hold_every_row_and_nothing_else(layout: ArrayLayout, seed: int, data: st.DataObject) -> None:
    values = values_of(layout, seed)
    for shard in range(layout.n_shards):
        made = encoded(layout, shard, values)
        whole = b"".join(bytes(part) for part in made.parts)
        assert (made.nbytes, made.crc32c) == (len(whole), crc32c(whole))
        assert made.nbytes <= layout.max_shard_nbytes(shard)
        if layout.compression is None:
            assert made.nbytes == layout.shard_nbytes(shard)
        start = shard * layout.shard_rows
        rows = decode(layout, shard, whole)
        np.testing.assert_array_equal(bits(rows), bits(values[start : start + layout.shard_rows]))
        again = encoded(layout, shard, values)
        assert b"".join(bytes(part) for part in again.parts) == whole
        # Whatever bit of the object is flipped, its checksum changes.
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        assert crc32c(bytes(flipped)) != made.crc32c


@settings(bounded, max_examples=40)
@given(layouts(), st.integers(0, 99), st.data())
def test_rows_are_numpys(layout: ArrayLayout, seed: int, data: st.DataObject) -> None:
    values = values_of(layout, seed)
    with stored((layout, values)) as blobs:
        rows = rows_of(blobs, layout)
        for _ in range(8):
            key = data.draw(keys(layout.shape))
            found, expected = rows[key], np.asarray(values[key])
            assert found.shape == expected.shape
            np.testing.assert_array_equal(bits(found), bits(expected))


@settings(bounded, max_examples=25)
@given(st.data(), st.integers(0, 99))
def test_sections_are_one_array(data: st.DataObject, seed: int) -> None:
    inner = tuple(data.draw(st.lists(st.integers(1, 4), max_size=2)))
    kind = data.draw(st.sampled_from(DTYPES))
    parts = []
    for number in range(data.draw(st.integers(1, 4))):
        part = data.draw(layouts(path=f"parts/{number}", inner=inner))
        parts.append(dataclasses.replace(part, dtype=kind))
    values = [values_of(part, seed + number) for number, part in enumerate(parts)]
    whole = np.concatenate(values)
    with stored(*zip(parts, values, strict=True)) as blobs:
        rows = rows_of(blobs, *parts)
        assert rows.shape == whole.shape
        for _ in range(8):
            key = data.draw(keys(whole.shape))
            np.testing.assert_array_equal(bits(rows[key]), bits(whole[key]))


def with_zarr(path: Path) -> Any:
    return zarr.open_array(path, mode="r")[...]


def with_tensorstore(path: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result().read().result()


@bounded
@given(layouts(), st.integers(0, 99))
def test_others_read_our_bits(layout: ArrayLayout, seed: int) -> None:
    values = values_of(layout, seed)
    with stored((layout, values)) as blobs:
        for read in (with_zarr, with_tensorstore):
            found = read(blobs.path(layout.path))
            assert str(found.dtype) == layout.dtype
            np.testing.assert_array_equal(bits(found), bits(values), err_msg=read.__name__)


def native(values: NDArray[Any], layout: ArrayLayout) -> NDArray[Any]:
    return values.view(ml_dtypes.bfloat16) if layout.dtype == "bfloat16" else values


def zarr_writes(folder: Path, layout: ArrayLayout, values: NDArray[Any]) -> None:
    shuffles: dict[Compression, tuple[int, Any]] = {"lz4": (5, "bitshuffle"), "zstd": (1, "shuffle")}
    compressor = None
    if layout.compression is not None:
        level, shuffle = shuffles[layout.compression]
        compressor = BloscCodec(
            cname=layout.compression, clevel=level, shuffle=shuffle, typesize=layout.itemsize, blocksize=0
        )
    array = zarr.create_array(
        folder,
        shape=layout.shape,
        shards=(layout.shard_rows, *layout.shape[1:]),
        chunks=(layout.chunk_rows, *layout.shape[1:]),
        dtype=ml_dtypes.bfloat16 if layout.dtype == "bfloat16" else layout.dtype,
        compressors=compressor,
        # Else it leaves out chunks of fill values, which the format does not, and compares NaNs to find them.
        config={"write_empty_chunks": True},
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=layout.axes,
    )
    array[...] = native(values, layout)


def tensorstore_writes(folder: Path, layout: ArrayLayout, values: NDArray[Any]) -> None:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder)},
        "metadata": layout.metadata(),
        "store_data_equal_to_fill_value": True,
    }
    tensorstore.open(spec, create=True).result().write(native(values, layout)).result()


@pytest.mark.parametrize("write", [zarr_writes, tensorstore_writes])
@bounded
@given(layout=layouts(), seed=st.integers(0, 99))
def test_we_read_what_others_write(write: Any, layout: ArrayLayout, seed: int) -> None:
    values = values_of(layout, seed)
    with tempfile.TemporaryDirectory() as folder:
        blobs = LocalBlobs(folder)
        path = blobs.path(layout.path)
        write(path, layout, values)
        rows = rows_of(blobs, layout)
        np.testing.assert_array_equal(bits(rows[:]), bits(values))
        np.testing.assert_array_equal(bits(rows[-1]), bits(values[-1]))
        theirs = json.loads((path / "zarr.json").read_bytes())
        ours: Any = layout.metadata()
        assert theirs["shape"] == ours["shape"]
        codecs = [metadata["codecs"][0]["configuration"]["codecs"] for metadata in (theirs, ours)]
        assert [codec["name"] for codec in codecs[0]] == [codec["name"] for codec in codecs[1]]
        if layout.compression is not None:
            assert codecs[0][-1] == codecs[1][-1]
            return
        for shard in range(layout.n_shards):
            whole = (path.parent.parent / layout.key(shard)).read_bytes()
            read_index(blobs, layout, shard, len(whole))
            expected = b"".join(bytes(part) for part in encoded(layout, shard, values).parts)
            assert len(whole) == len(expected)
            # What others put where there are no rows is their affair; we put zeros.
            n_data = layout.rows_in(shard) * layout.row_nbytes
            assert whole[:n_data] == expected[:n_data]
            assert whole[layout.data_nbytes(shard) :] == expected[layout.data_nbytes(shard) :]

"""zarr-python and tensorstore read the bits that actstore wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from actstore.storage.local import LocalBlobs
from actstore.store.format.compression import Compression
from actstore.store.format.layout import ArrayLayout
from tests.store.arrays import bits, random_bits, write_array
from tests.store.example import example_plan, example_tokens, example_values
from tests.store.example import write_store as write

DTYPES = ("float32", "float16", "bfloat16")
Reader = Callable[[Path], Any]


def with_zarr(path: Path) -> Any:
    return zarr.open_array(path, mode="r")[...]


def with_tensorstore(path: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result().read().result()


READERS = pytest.mark.parametrize("read", [with_zarr, with_tensorstore])


COMPRESSIONS = pytest.mark.parametrize("compression", [None, "lz4", "zstd"])


def layout(dtype: str, n_rows: int = 37, compression: Compression | None = None) -> ArrayLayout:
    """An array whose last of three shards has 5 of 16 rows: two of its four inner chunks, the second one padded."""
    axes = ("sequence", "position", "d_model")
    return ArrayLayout("acts/h", (n_rows, 8, 16), dtype, axes, 16, 4, compression)


@READERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [37, 32, 3, 48])
@COMPRESSIONS
def test_bits_are_equal(
    local: LocalBlobs, dtype: str, n_rows: int, read: Reader, compression: Compression | None
) -> None:
    array = layout(dtype, n_rows, compression)
    values = random_bits(array)
    write_array(local, array, values, range(array.n_shards))
    opened = read(local.path(array.path))
    assert str(opened.dtype) == dtype
    np.testing.assert_array_equal(bits(opened), bits(values))


@READERS
@pytest.mark.parametrize("dtype", DTYPES)
@COMPRESSIONS
def test_shards_that_are_not_there_read_as_nan(
    local: LocalBlobs, dtype: str, read: Reader, compression: Compression | None
) -> None:
    array = layout(dtype, compression=compression)
    values = random_bits(array)
    write_array(local, array, values, shards=(0, 2))
    opened = read(local.path(array.path))
    np.testing.assert_array_equal(bits(opened[:16]), bits(values[:16]))
    np.testing.assert_array_equal(bits(opened[32:]), bits(values[32:]))
    assert np.isnan(opened[16:32].astype(np.float32)).all()


@READERS
@COMPRESSIONS
def test_single_rows_and_slices(local: LocalBlobs, read: Reader, compression: Compression | None) -> None:
    array = layout("float32", compression=compression)
    values = random_bits(array)
    write_array(local, array, values, range(3))
    if read is with_zarr:
        opened: Any = zarr.open_array(local.path(array.path), mode="r")
        selections = [opened[36], opened[15:33, 2:5]]
    else:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(local.path(array.path))}}
        opened = tensorstore.open(spec).result()
        selections = [opened[36].read().result(), opened[15:33, 2:5].read().result()]
    for selection, expected in zip(selections, [values[36], values[15:33, 2:5]], strict=True):
        np.testing.assert_array_equal(bits(selection), bits(expected))


@READERS
@pytest.mark.parametrize("path", ["tokens", "lengths", "documents", "offsets"])
def test_tokens(local: LocalBlobs, read: Reader, path: str) -> None:
    plan = example_plan()
    write(local, plan, example_values(plan), segments=())
    np.testing.assert_array_equal(read(local.path(path)), example_tokens(plan)[path])


def test_store_is_a_group_of_named_arrays(local: LocalBlobs) -> None:
    plan = example_plan("bfloat16")
    write(local, plan, example_values(plan), range(3))
    group = zarr.open_group(local.url, mode="r")
    assert {"acts", "tokens", "lengths", "documents", "offsets"} <= set(group.keys())
    acts = group["acts"]
    assert isinstance(acts, zarr.Group)
    assert set(acts.keys()) == set(plan.hook_names)
    names = zarr.open_array(local.url, path="acts/blocks.1.attn.hook_z", mode="r").metadata.to_dict()[
        "dimension_names"
    ]
    assert names == ("sequence", "position", "head", "d_head")

"""zarr-python finds bfloat16 by itself, and never changes a bit of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr

from actstore.storage.local import LocalBlobs
from actstore.store.format.bfloat16 import BFloat16
from actstore.store.format.layout import ROOT_METADATA, ArrayLayout, group_metadata, to_json
from tests.store.arrays import bits, random_bits, write_array

EVERY = np.arange(1 << 16, dtype="<u2")
"""Every bit pattern: both zeros, both infinities, all subnormals, all NaNs."""


ZARR_LOADS_TYPES = tuple(int(part) for part in zarr.__version__.split(".")[:2]) >= (3, 4)
DIRECT = pytest.mark.xfail(
    not ZARR_LOADS_TYPES,
    reason="zarr-python 3.1 loads no data type of others when an array is opened directly",
)


@pytest.mark.parametrize(
    "opened",
    [
        'zarr.open_group(root, mode="r")["a"]',
        'zarr.open(root, mode="r")["a"]',
        pytest.param('zarr.open_array(root, path="a", mode="r")', marks=DIRECT),
        pytest.param('zarr.open(root + "/a", mode="r")', marks=DIRECT),
    ],
)
def test_zarr_finds_it_by_itself(tmp_path: Path, opened: str) -> None:
    layout = ArrayLayout("a", (5, 4), "bfloat16", ("sequence", "position"), 4, 2)
    values = random_bits(layout)
    blobs = LocalBlobs(tmp_path)
    blobs.create(ROOT_METADATA, [to_json(group_metadata({}))])
    write_array(blobs, layout, values, range(2))
    # Nothing here imports actstore; it is only installed.
    script = f"""
import sys, zarr
root = sys.argv[1]
a = {opened}
print(a.dtype, a[:].view("<u2").tobytes().hex(), "torch" in sys.modules)
"""
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.split() == ["bfloat16", values.tobytes().hex(), "False"], done.stderr


@pytest.mark.parametrize("shards", [None, (16_384,)])
def test_every_bit_pattern_survives_zarr(tmp_path: Path, shards: Any) -> None:
    made = zarr.create_array(
        tmp_path / "a",
        shape=(1 << 16,),
        chunks=(4096,),
        shards=shards,
        dtype=ml_dtypes.bfloat16,
        config={"write_empty_chunks": True},  # otherwise zarr compares NaNs, and NumPy warns
    )
    made[:] = EVERY.view(ml_dtypes.bfloat16)
    read = np.asarray(zarr.open_array(tmp_path / "a", mode="r")[:])
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(bits(read), EVERY)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a")}}
    np.testing.assert_array_equal(bits(tensorstore.open(spec).result().read().result()), EVERY)


@pytest.mark.parametrize("shards", [None, (64,)])
def test_arrays_that_zarr_makes_say_that_they_are_little_endian(tmp_path: Path, shards: Any) -> None:
    zarr.create_array(tmp_path / "a", shape=(64,), chunks=(16,), shards=shards, dtype=ml_dtypes.bfloat16)
    metadata = json.loads((tmp_path / "a/zarr.json").read_bytes())
    assert metadata["data_type"] == "bfloat16"
    codecs = metadata["codecs"] if shards is None else metadata["codecs"][0]["configuration"]["codecs"]
    assert codecs[0] == {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0.0, 0.0), (1.5, 1.5), (float("nan"), "NaN"), (float("inf"), "Infinity"), (-float("inf"), "-Infinity")],
)
def test_fill_values(tmp_path: Path, value: float, encoded: object) -> None:
    zarr.create_array(
        tmp_path / "a",
        shape=(4,),
        chunks=(4,),
        dtype=ml_dtypes.bfloat16,
        fill_value=ml_dtypes.bfloat16(value),
    )
    assert json.loads((tmp_path / "a/zarr.json").read_bytes())["fill_value"] == encoded
    read = np.asarray(zarr.open_array(tmp_path / "a", mode="r")[:])
    np.testing.assert_array_equal(read.astype(np.float32), np.full(4, value, np.float32))


def test_zarr_2_has_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Zarr format 2 has no bfloat16"):
        zarr.create_array(tmp_path / "a", shape=(4,), chunks=(4,), dtype=ml_dtypes.bfloat16, zarr_format=2)


@pytest.mark.parametrize("other", [np.float16, np.uint16, np.float32])
def test_other_types_are_not_taken_for_it(other: Any) -> None:
    with pytest.raises(ValueError, match="Expected ml_dtypes"):
        BFloat16.from_native_dtype(np.dtype(other))


@pytest.mark.parametrize("scalar", ["1.5", None, 1j])
def test_what_is_no_number_is_no_scalar(scalar: object) -> None:
    with pytest.raises(TypeError, match="to bfloat16"):
        BFloat16().cast_scalar(scalar)

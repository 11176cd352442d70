"""The store by itself, without a model: shards to disk and back, against the disk, memory and zarr-python."""

import mmap
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from actstore.store.layout import ArrayLayout, to_json
from actstore.store.local import LocalBlobs
from actstore.store.rows import Rows, Section
from actstore.store.shard import encode
from tests.benchmarks.measure import Ratio, all_in_turns

# 2,048 sequences of 128 positions of width 2,048, float16: 1 GiB in 16 shards of 64 MiB, inner chunks of 1 MiB.
LAYOUT = ArrayLayout("acts/h", (2048, 128, 2048), "float16", ("sequence", "position", "d_model"), 128, 2)
NBYTES = LAYOUT.shape[0] * LAYOUT.row_nbytes
_N_WRITERS = 4
"""Shards on their way at once, as in a worker: one is summed up while another is written."""
_N_POINT_READS = 2000


def _memory(nbytes: int) -> NDArray[np.uint8]:
    """Page-aligned, of huge pages, and touched, like the buffers of a worker."""
    memory = mmap.mmap(-1, nbytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    values = np.frombuffer(memory, np.uint8)
    values[:] = 0
    return values


def _values() -> NDArray[Any]:
    values = _memory(NBYTES)
    values[:] = np.frombuffer(np.random.default_rng(0).bytes(64 << 20), np.uint8).repeat(16)
    return values.view("<f2").reshape(LAYOUT.shape)


@contextmanager
def _rate() -> Iterator[list[float]]:
    """GB/s of the block, as the one entry of the list."""
    found: list[float] = []
    started = time.perf_counter()
    yield found
    found.append(NBYTES / (time.perf_counter() - started) / 1e9)


def _written(folder: Path, values: NDArray[Any]) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    blobs = LocalBlobs(folder)
    blobs.create(LAYOUT.metadata_key, [to_json(LAYOUT.metadata())])

    def write(index: int) -> None:
        rows = values[index * LAYOUT.shard_rows : (index + 1) * LAYOUT.shard_rows]
        shard = encode(LAYOUT, index, rows)
        assert blobs.create(shard.key, shard.parts)

    with ThreadPoolExecutor(_N_WRITERS) as writers, _rate() as rate:
        list(writers.map(write, range(LAYOUT.n_shards)))
    return rate[0]


def _raw_written(path: Path, values: NDArray[Any], flags: int) -> float:
    path.unlink(missing_ok=True)
    data = memoryview(values.reshape(-1).view(np.uint8).data)
    with _rate() as rate:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        step = LAYOUT.data_nbytes(0)
        for start in range(0, NBYTES, step):
            assert os.write(descriptor, data[start : start + step]) == step
        os.fsync(descriptor)
        os.close(descriptor)
    return rate[0]


def _zarr_written(folder: Path, values: NDArray[Any]) -> float:
    """The same array, shards and chunks; its files are synced as ours are."""
    shutil.rmtree(folder, ignore_errors=True)
    with _rate() as rate:
        array = zarr.create_array(
            folder,
            shape=LAYOUT.shape,
            shards=(LAYOUT.shard_rows, *LAYOUT.shape[1:]),
            chunks=(LAYOUT.chunk_rows, *LAYOUT.shape[1:]),
            dtype="float16",
            compressors=None,
        )
        array[:] = values
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    return rate[0]


def _read(rows: Rows, out: NDArray[Any]) -> float:
    with _rate() as rate:
        rows.read(..., out)
    return rate[0]


def _raw_read(paths: list[Path], out: NDArray[Any]) -> float:
    places = out.reshape(len(paths), -1).view(np.uint8)
    with _rate() as rate:
        for path, place in zip(paths, places, strict=True):
            with path.open("rb", buffering=0) as file:
                assert file.readinto(place.data) == len(place)
    return rate[0]


def _zarr_read(folder: Path) -> float:
    with _rate() as rate:
        zarr.open_array(folder, path=LAYOUT.path, mode="r")[...]
    return rate[0]


def _point_ms(blobs: LocalBlobs, section: Section) -> float:
    """Median of single rows anywhere, with the making of `Rows` each time."""
    numbers = np.random.default_rng(0).integers(0, LAYOUT.shape[0], _N_POINT_READS).tolist()
    seconds = []
    for number in numbers:
        started = time.perf_counter()
        Rows(blobs, [section])[number]
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3


def run(folder: Path, *, repeats: int = 5) -> list[Ratio]:
    """All in turns; what is read lies in the page cache."""
    values = _values()
    store = folder / "store"
    written = all_in_turns(
        {
            "ours": lambda: _written(store, values),
            "buffered": lambda: _raw_written(folder / "raw", values, 0),
            "direct": lambda: _raw_written(folder / "raw", values, os.O_DIRECT),
            "zarr": lambda: _zarr_written(folder / "zarr", values),
        },
        repeats=repeats,
    )
    (folder / "raw").unlink()
    shutil.rmtree(folder / "zarr")
    raw = max(("buffered", "direct"), key=written.__getitem__)

    # Direct writes leave nothing in the page cache; the first round of reads fills it, and is not counted.
    blobs, section = LocalBlobs(store), Section(LAYOUT, lambda _: True)
    rows, out = Rows(blobs, [section]), _memory(NBYTES).view("<f2").reshape(LAYOUT.shape)
    paths = [blobs.path(LAYOUT.key(shard)) for shard in range(LAYOUT.n_shards)]
    _read(rows, out)
    assert np.array_equal(out.view("<u2"), values.view("<u2"))
    read = all_in_turns(
        {
            "ours": lambda: _read(rows, out),
            "raw": lambda: _raw_read(paths, out),
            "zarr": lambda: _zarr_read(store),
        },
        repeats=repeats,
    )
    point_ms = statistics.median(_point_ms(blobs, section) for _ in range(repeats))
    shutil.rmtree(store)
    name = "1 GiB, float16, 16 shards"
    return [
        Ratio(f"write {name}, fsync", written["ours"], written[raw], "GB/s", 0.9, f"raw file, {raw}, fsync"),
        Ratio(f"write {name}, fsync", written["ours"], written["zarr"], "GB/s", 3, "zarr-python"),
        Ratio(f"read {name}, cached", read["ours"], read["raw"], "GB/s", 0.9, "raw files, readinto"),
        Ratio(f"read {name}, cached", read["ours"], read["zarr"], "GB/s", 3, "zarr-python"),
        Ratio("one row of 512 KiB, local, median", point_ms, point_ms, "ms", 0.2, "-", lower_is_better=True),
    ]

"""The store alone, without a model: shards to disk and back, compared with the disk, memory and zarr-python."""

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

from actstore.storage.local import LocalBlobs
from actstore.store.format.layout import ArrayLayout, to_json
from actstore.store.format.shard import encode
from actstore.store.reading.rows import Rows, Section
from tests.benchmarks.measure import Against, Figure, Result, Speed, Work, interleaved

# 2,048 sequences of 128 positions of width 2,048, float16: 1 GiB in 16 shards of 64 MiB, inner chunks of 1 MiB.
LAYOUT = ArrayLayout("acts/h", (2048, 128, 2048), "float16", ("sequence", "position", "d_model"), 128, 2)
NBYTES = LAYOUT.shape[0] * LAYOUT.row_nbytes
_N_WRITERS = 4
"""Shards in progress at once, as in a worker: one is checksummed while another is written."""
_N_POINT_READS = 2000


def _memory(nbytes: int) -> NDArray[np.uint8]:
    """Page-aligned memory in huge pages, touched once, like the buffers of a worker."""
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
def _timed() -> Iterator[list[Work]]:
    """Time the block as work, the one entry of the list."""
    works: list[Work] = []
    started = time.perf_counter()
    yield works
    works.append(Work(NBYTES, time.perf_counter() - started))


def _written(folder: Path, values: NDArray[Any]) -> Work:
    shutil.rmtree(folder, ignore_errors=True)
    blobs = LocalBlobs(folder)
    blobs.create(LAYOUT.metadata_key, [to_json(LAYOUT.metadata())])

    def write(index: int) -> None:
        rows = values[index * LAYOUT.shard_rows : (index + 1) * LAYOUT.shard_rows]
        shard = encode(LAYOUT, index, rows)
        assert blobs.create(shard.key, shard.parts)

    with ThreadPoolExecutor(_N_WRITERS) as writers, _timed() as works:
        list(writers.map(write, range(LAYOUT.n_shards)))
    return works[0]


def _raw_written(path: Path, values: NDArray[Any], flags: int) -> Work:
    path.unlink(missing_ok=True)
    data = memoryview(values.reshape(-1).view(np.uint8).data)
    with _timed() as works:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        step = LAYOUT.data_nbytes(0)
        for start in range(0, NBYTES, step):
            assert os.write(descriptor, data[start : start + step]) == step
        os.fsync(descriptor)
        os.close(descriptor)
    return works[0]


def _zarr_written(folder: Path, values: NDArray[Any]) -> Work:
    """Write the same array, shards and chunks; the files are synced as ours are."""
    shutil.rmtree(folder, ignore_errors=True)
    with _timed() as works:
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
    return works[0]


def _read(rows: Rows, out: NDArray[Any]) -> Work:
    with _timed() as works:
        rows.read(..., out)
    return works[0]


def _raw_read(paths: list[Path], out: NDArray[Any]) -> Work:
    places = out.reshape(len(paths), -1).view(np.uint8)
    with _timed() as works:
        for path, place in zip(paths, places, strict=True):
            with path.open("rb", buffering=0) as file:
                assert file.readinto(place.data) == len(place)
    return works[0]


def _zarr_read(folder: Path) -> Work:
    with _timed() as works:
        zarr.open_array(folder, path=LAYOUT.path, mode="r")[...]
    return works[0]


def _point_ms(blobs: LocalBlobs, section: Section) -> float:
    """Median time to read single random rows, creating `Rows` each time."""
    numbers = np.random.default_rng(0).integers(0, LAYOUT.shape[0], _N_POINT_READS).tolist()
    seconds = []
    for number in numbers:
        started = time.perf_counter()
        Rows(blobs, [section])[number]
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3


def run(folder: Path, *, repeats: int = 5) -> list[Result]:
    """Measure all sides in turns; what is read is in the page cache."""
    values = _values()
    store = folder / "store"
    written = interleaved(
        {
            "ours": lambda: _written(store, values),
            "buffered": lambda: _raw_written(folder / "raw", values, 0),
            "direct": lambda: _raw_written(folder / "raw", values, os.O_DIRECT),
            "zarr": lambda: _zarr_written(folder / "zarr", values),
        }
    )
    (folder / "raw").unlink()
    shutil.rmtree(folder / "zarr")
    best = max(("buffered", "direct"), key=lambda how: written[how].median)

    # Direct writes leave nothing in the page cache; the first round of reads fills it, and is not counted.
    blobs, section = LocalBlobs(store), Section(LAYOUT, lambda _: True)
    rows, out = Rows(blobs, [section]), _memory(NBYTES).view("<f2").reshape(LAYOUT.shape)
    paths = [blobs.path(LAYOUT.key(shard)) for shard in range(LAYOUT.n_shards)]
    _read(rows, out)
    assert np.array_equal(out.view("<u2"), values.view("<u2"))
    read = interleaved(
        {
            "ours": lambda: _read(rows, out),
            "raw": lambda: _raw_read(paths, out),
            "zarr": lambda: _zarr_read(store),
        }
    )
    point_ms = statistics.median(_point_ms(blobs, section) for _ in range(repeats))
    shutil.rmtree(store)
    name = "1 GiB, float16, 16 shards"
    disk = Against(f"raw file, {best}, fsync", written[best], 0.9, is_limit=True)
    memory = Against("raw files, readinto", read["raw"], 0.9, is_limit=True)
    return [
        Speed(
            f"write {name}, fsync",
            "GB/s",
            written["ours"],
            (disk, Against("zarr-python", written["zarr"], 3)),
            1e9,
        ),
        Speed(
            f"read {name}, cached",
            "GB/s",
            read["ours"],
            (memory, Against("zarr-python", read["zarr"], 3)),
            1e9,
        ),
        Figure("one row of 512 KiB, local, median", point_ms, "ms", 0.2),
    ]

"""Mapped files give what was stored, or an error, whatever happens to the files meanwhile."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.facade import Store
from actstore.loader.rows.address_range import AddressRange
from actstore.loader.rows.shard_places import ShardPlaces
from actstore.storage.local import LocalBlobs
from tests.commands import command
from tests.loader.stores import A, finished
from tests.store.example import LENGTH, example_plan, example_values, write_store
from tests.store.runs import tokens_run, write_run

ROW_NBYTES = 64
ROWS_PER_PAGE = 4096 // ROW_NBYTES
ROWS_PER_SHARD = 16 * LENGTH
"""Two pages; the index of the shard comes behind them."""


def range_of(store: Store, shards: NDArray[np.int64] | None = None) -> AddressRange:
    return AddressRange(LocalBlobs(store.url), ShardPlaces(store[A].rows.layouts), shards)


def gathered(mapped: AddressRange, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    out = torch.zeros(len(rows), ROW_NBYTES, dtype=torch.uint8)
    mapped.gather(rows, out)
    return out.numpy()


def path_of(store: Store, shard: int) -> Path:
    return Path(store.url) / f"acts/{A}/c.{shard}.0.0"


@pytest.mark.parametrize("is_known", [False, True], ids=["never read", "read before"])
@pytest.mark.parametrize(
    "n_zeros", [0, 16, ROWS_PER_PAGE], ids=["no zeros", "zeros at the end", "a page of zeros"]
)
@pytest.mark.parametrize("size", [0, 64, 4095, 4096, 4096 + 64, 8191])
def test_a_cut_anywhere(tmp_path: Path, size: int, n_zeros: int, is_known: bool) -> None:
    plan = example_plan()
    values = {name: array.copy() for name, array in example_values(plan).items()}
    values[A].reshape(-1, ROW_NBYTES // 4)[2 * ROWS_PER_SHARD - n_zeros : 2 * ROWS_PER_SHARD] = 0
    blobs = LocalBlobs(tmp_path / "store")
    write_store(blobs, plan, values, range(plan.n_segments))
    mapped = AddressRange(blobs, ShardPlaces([plan.activations(plan.request.hooks[0])]))
    expected = values[A].reshape(-1, ROW_NBYTES // 4).view(np.uint8)
    pages = np.arange(ROWS_PER_SHARD, 2 * ROWS_PER_SHARD).reshape(2, ROWS_PER_PAGE)
    if is_known:
        gathered(mapped, pages.reshape(-1))
    os.truncate(blobs.path(f"acts/{A}/c.1.0.0"), size)
    # If the last page held only zeros, nothing is lost; but a file's size is checked when it is first read.
    is_lost = size <= 4096 or expected[pages].reshape(-1)[size:].any() or not is_known
    for rows in (pages[1, -1:], pages[0, -1:], pages[0, :1], pages[0], pages[1], pages[0]):
        if is_lost:
            message = r"c\.1\.0\.0 has become shorter .* the store is damaged: run"
            with pytest.raises(StorageError, match=message):
                gathered(mapped, rows)
        else:
            np.testing.assert_array_equal(gathered(mapped, rows), expected[rows])


@pytest.mark.parametrize("n_more", [-1, 1, 4096])
def test_a_file_of_another_size_is_not_mapped(store: Store, n_more: int) -> None:
    """A file of another size is of unknown content; a longer one can be another file, or two at once."""
    size = path_of(store, 1).stat().st_size
    os.truncate(path_of(store, 1), size + n_more)
    with pytest.raises(
        StorageError, match=rf"c\.1\.0\.0 has {size + n_more} bytes where {size} were expected"
    ):
        range_of(store)
    range_of(store, np.array([0, 2]))


def test_a_file_that_is_replaced_or_removed_stays_as_it_was(store: Store) -> None:
    mapped = range_of(store)
    rows = np.arange(37 * LENGTH)
    expected = gathered(range_of(store), rows)
    other = Path(store.url) / "other"
    other.write_bytes(b"short")
    other.replace(path_of(store, 0))
    path_of(store, 1).unlink()
    for _ in range(2):
        np.testing.assert_array_equal(gathered(mapped, rows), expected)


def test_some_shards(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    first, second = example_plan(), tokens_run("0001", n_sequences=21, segment_size=16)
    parts = [write_run(blobs, plan)[A] for plan in (first, second)]
    expected = np.concatenate([part.reshape(-1, ROW_NBYTES // 4) for part in parts]).view(np.uint8)
    places = ShardPlaces([plan.activations(plan.request.hooks[0]) for plan in (first, second)])
    assert places.n_shards == 5
    mapped = AddressRange(blobs, places, np.array([1, 2, 4]))
    rows = np.arange(len(expected))
    rows = np.random.default_rng(0).permutation(rows[mapped.has(places(rows))])
    assert len(rows) == (21 + 5) * LENGTH
    np.testing.assert_array_equal(gathered(mapped, rows), expected[rows])


def test_released_when_nobody_holds_it(store: Store) -> None:
    mapped = range_of(store)
    assert mapped.nbytes == sum(path_of(store, shard).stat().st_size for shard in range(3))
    mapped.close()
    assert mapped.nbytes == 0


@pytest.mark.parametrize("has_other_handler", [False, True])
def test_the_signal_is_ours_and_that_of_others_still_theirs(store: Store, has_other_handler: bool) -> None:
    """`faulthandler` takes the signal after us, and a fault outside our memory ends the process, as it would without
    us.
    """
    code = f"""
import faulthandler, mmap, os
from pathlib import Path
import actstore
from actstore.errors import StorageError

loader = actstore.open({store.url!r}).loader({A!r}, batch_size=256, epochs=None, prefetch=0)
next(loader)
if {has_other_handler}:
    faulthandler.enable()
os.truncate({str(path_of(store, 1))!r}, 64)
try:
    for _ in range(9):
        next(loader)
except StorageError:
    print("raised", flush=True)
other = Path({str(path_of(store, 0))!r}).with_name("other")
other.write_bytes(bytes(8192))
with other.open("r+b") as file:
    foreign = mmap.mmap(file.fileno(), 8192)
os.truncate(other, 0)
print(foreign[5000])
"""
    done = command(code=code)
    assert done.stdout == "raised\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == has_other_handler


def test_a_sparse_hook(tmp_path: Path) -> None:
    """Rows of zeros in holes of a file are read like any other."""
    plan = example_plan()
    zeros = {name: np.zeros_like(array) for name, array in example_values(plan).items()}
    blobs = LocalBlobs(tmp_path / "store")
    write_store(blobs, plan, zeros, range(plan.n_segments))
    mapped = AddressRange(blobs, ShardPlaces([plan.activations(plan.request.hooks[0])]))
    for _ in range(2):
        assert not gathered(mapped, np.arange(37 * LENGTH)).any()


def test_finished_store_maps(tmp_path: Path) -> None:
    store, values = finished(LocalBlobs(tmp_path / "store"), example_plan())
    rows = np.array([0, 295, 128, 127])
    np.testing.assert_array_equal(
        gathered(range_of(store), rows), values[A].reshape(-1, ROW_NBYTES // 4).view(np.uint8)[rows]
    )


def test_more_pages_than_there_may_be_maps(tmp_path: Path) -> None:
    """A large file that is cut while all of it is mapped takes one map, not one per page."""
    code = f"""
import ctypes, os
import numpy as np
from actstore.loader.rows import mapping

nbytes = 70_000 * 4096
file = os.open({str(tmp_path / "sparse")!r}, os.O_RDWR | os.O_CREAT)
os.truncate(file, nbytes)
base = mapping.reserve(nbytes)
faults = []

def on_fault(address):
    faults.append(address)
    return base, nbytes

mapping.listen(on_fault)
mapping.map_file(base, nbytes, file)
memory = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(base))
os.truncate(file, 4096)
print(memory[::4096].sum(), faults == [base + 4096])
"""
    done = command(code=code)
    assert done.stdout == "0 True\n", (done.returncode, done.stderr)

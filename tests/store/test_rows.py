"""Indexing, against NumPy on the same values."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actstore.errors import NotCommittedError, StorageError
from actstore.store.blobs import BlobNotFoundError, Blobs
from actstore.store.layout import ArrayLayout
from actstore.store.local import LocalBlobs
from actstore.store.rows import Rows
from tests.store.example import random_bits, write_array

N = 37
LAYOUT = ArrayLayout("acts/h", (N, 8, 6), "bfloat16", ("sequence", "position", "d_model"), 16, 4)
VALUES = random_bits(LAYOUT)
MASK = np.arange(N) % 3 == 0
LONG = np.random.default_rng(0).integers(-N, N, 200)


def rows_of(blobs: Blobs, shards: tuple[int, ...] = (0, 1, 2)) -> Rows:
    write_array(blobs, LAYOUT, VALUES, shards)
    return Rows(blobs, LAYOUT, shards.__contains__)


KEYS: dict[str, Any] = {
    "first": 0,
    "last": N - 1,
    "negative": -1,
    "most negative": -N,
    "numpy integer": np.int64(20),
    "all": slice(None),
    "ellipsis": ...,
    "empty tuple": (),
    "within a shard": slice(3, 7),
    "across a border": slice(15, 17),
    "across all shards": slice(1, 36),
    "past the end": slice(30, 100),
    "negative slice": slice(-5, -1),
    "step": slice(2, 35, 5),
    "backwards": slice(None, None, -1),
    "backwards by 7": slice(35, 2, -7),
    "empty slice": slice(5, 5),
    "empty beyond": slice(50, 60),
    "list": [3, 4, 5, 20, 36],
    "list, unsorted with repeats": [36, 0, 0, 17, -1, 17, 16, 15],
    "list of one": [4],
    "empty list": [],
    "array": LONG,
    "unsigned array": np.array([1, 2, 36], dtype=np.uint8),
    "mask": MASK,
    "empty mask": np.zeros(N, dtype=bool),
    "mask as a list": MASK.tolist(),
    "row and position": (3, 2),
    "one number": (3, 2, 1),
    "negative everywhere": (-1, -2, -3),
    "positions": (slice(None), 2),
    "positions of a row": (20, slice(1, 6, 2)),
    "last of each": (slice(None), -1),
    "part of d_model": (slice(14, 18), slice(None), slice(2, 4)),
    "backwards inside": (slice(14, 18), slice(None, None, -1)),
    "ellipsis first": (..., 0),
    "ellipsis last": (3, ...),
    "ellipsis in the middle": (slice(10, 20), ..., 1),
    "ellipsis for nothing": (1, 2, ..., 3),
    "list and position": ([1, 36, 20], 3),
    "list and slices": ([1, 36, 20], slice(0, 2), slice(4, 6)),
    "mask and position": (MASK, slice(None), 2),
    "empty list and position": ([], 3),
    "a list of positions": (slice(14, 18), [0, 2]),
    "a list of positions of a row": (20, [5, 2, 5]),
    "empty inside": (slice(0, 20), slice(4, 4)),
}


@pytest.mark.parametrize("name", KEYS)
def test_indexing_is_numpys(local: LocalBlobs, name: str) -> None:
    key = KEYS[name]
    # NumPy takes an empty list for floats.
    oracle = VALUES[np.array(key, int)] if isinstance(key, list) and not key else None
    if isinstance(key, tuple) and isinstance(key[0] if key else None, list):
        key = (np.array(key[0], int), *key[1:])
    expected = np.asarray(VALUES[key] if oracle is None else oracle)
    found = np.asarray(rows_of(local)[KEYS[name]])
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "name", ["last", "across all shards", "list, unsorted with repeats", "mask and position"]
)
def test_indexing_every_storage(blobs: Blobs, name: str) -> None:
    np.testing.assert_array_equal(rows_of(blobs)[KEYS[name]], VALUES[KEYS[name]])


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (N, "row 37 is out of bounds for 37 rows"),
        (-N - 1, "row -38 is out of bounds for 37 rows"),
        ([0, 99], "row 99 is out of bounds for 37 rows"),
        ((0, 8), "out of bounds"),
        ((slice(5, 5), 8), "out of bounds"),
        ((0, 0, 0, 0), "too many indices: the array has 3 axes, 4 were indexed"),
        ((..., 0, 0, 0, 0), "too many indices"),
        ((..., ...), "single ellipsis"),
        (1.0, "not 1.0"),
        ([1.5], "rows are chosen by an integer, a slice, or a list of integers"),
        ("0", "rows are chosen by"),
        (None, "rows are chosen by"),
        ([[0, 1]], "rows are chosen by"),
        (np.ones(N - 1, dtype=bool), r"a mask of rows must have shape \(37,\), got \(36,\)"),
        (([0, 1], [2, 3]), "only one axis can be indexed by a list"),
        ((3, slice(None), [0, 1]), "only one axis can be indexed by a list"),
    ],
)
def test_wrong_index_is_explained(local: LocalBlobs, key: Any, words: str) -> None:
    with pytest.raises(IndexError, match=words):
        rows_of(local)[key]


def test_values_are_the_callers_own(local: LocalBlobs) -> None:
    rows = rows_of(local)
    rows[0:4][:] = 0
    np.testing.assert_array_equal(rows[0:4], VALUES[0:4])


def test_rows_that_are_not_committed_raise(blobs: Blobs) -> None:
    rows = rows_of(blobs, shards=(0, 2))
    np.testing.assert_array_equal(rows[[0, 15, 32, 36]], VALUES[[0, 15, 32, 36]])
    for key in (16, slice(None), slice(15, 17), [0, 31]):
        with pytest.raises(NotCommittedError, match=r"of acts/h \(segment 1\) are not committed in"):
            rows[key]
    assert len(rows[5:5]) == 0


def test_shard_without_a_commit_is_not_read(local: LocalBlobs) -> None:
    write_array(local, LAYOUT, VALUES, range(3))
    rows = Rows(local, LAYOUT, {0, 2}.__contains__)
    with pytest.raises(NotCommittedError, match="rows 16:20 of acts/h"):
        rows[16:20]


def replaced(content: Callable[[bytes], bytes]) -> Callable[[Blobs], None]:
    def replace(blobs: Blobs) -> None:
        whole = bytes(blobs.read(LAYOUT.key(1)))
        blobs.delete(LAYOUT.key(1))
        blobs.create(LAYOUT.key(1), [content(whole)])

    return replace


@pytest.mark.parametrize("nbytes", [1, 10, LAYOUT.row_nbytes * 14 + 1])
def test_truncated_shard_is_damage(blobs: Blobs, nbytes: int) -> None:
    rows = rows_of(blobs)
    replaced(lambda whole: whole[:nbytes])(blobs)
    with pytest.raises(StorageError, match=r"acts/h/c\.1\.0\.0") as caught:
        rows[20:32]
    assert "damaged" in str(caught.value) or "cannot be read" in str(caught.value)
    np.testing.assert_array_equal(rows[0:16], VALUES[0:16])


def test_missing_shard_is_damage_and_not_absence(blobs: Blobs) -> None:
    rows = rows_of(blobs)
    blobs.delete(LAYOUT.key(1))
    with pytest.raises(BlobNotFoundError) as caught:
        rows[15:17]
    assert str(caught.value) == (f"{blobs.url}/acts/h/c.1.0.0 is committed but missing; the store is damaged")


def test_only_the_rows_asked_for_are_read(local: LocalBlobs) -> None:
    rows = rows_of(local)
    replaced(lambda whole: whole[: 4 * LAYOUT.row_nbytes])(local)
    expected: NDArray[Any] = VALUES[16:20]
    np.testing.assert_array_equal(rows[16:20], expected)


def test_many_scattered_rows_need_few_open_files(local: LocalBlobs) -> None:
    rows = rows_of(local)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, hard))
    try:
        values = rows[np.tile([0, 20], 30)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(values, VALUES[np.tile([0, 20], 30)])


def test_rows_are_arrays(local: LocalBlobs) -> None:
    rows = rows_of(local)
    assert np.array_equal(np.asarray(rows), VALUES)
    assert (rows.shape, len(rows)) == (VALUES.shape, N)

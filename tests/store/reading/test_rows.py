"""Indexing, against NumPy on the same values."""

import dataclasses
import resource
import tracemalloc
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actstore.errors import NotCommittedError, StorageError
from actstore.storage.blobs import BlobInfo, BlobNotFoundError, Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.compression import Compression
from actstore.store.format.layout import ArrayLayout
from actstore.store.reading.rows import Rows, Section
from actstore.store.reading.sections import Sections
from tests.store.arrays import random_bits, write_array
from tests.store.example import example_plan

N = 37
LAYOUT = ArrayLayout("acts/h", (N, 8, 6), "bfloat16", ("sequence", "position", "d_model"), 16, 4)
VALUES = random_bits(LAYOUT)
MASK = np.arange(N) % 3 == 0
LONG = np.random.default_rng(0).integers(-N, N, 200)


def section(is_committed: Callable[[int], bool], layout: ArrayLayout = LAYOUT) -> Section:
    return Section(layout, is_committed, "run the extraction again to complete them")


PARTS: tuple[tuple[str, int, int, Compression | None], ...] = (
    ("acts/h", 9, 8, None),
    ("parts/0001/acts/h", 17, 4, "lz4"),
    ("parts/0002/acts/h", 1, 16, None),
    ("parts/0003/acts/h", 10, 12, "zstd"),
)
SECTIONS = tuple(
    ArrayLayout(path, (n_rows, 8, 6), "bfloat16", LAYOUT.axes, shard_rows, 4, compression)
    for path, n_rows, shard_rows, compression in PARTS
)
"""The same 37 rows, written by four runs."""


def sections_of(blobs: Blobs) -> Rows:
    start = 0
    for layout in SECTIONS:
        write_array(blobs, layout, VALUES[start : start + layout.shape[0]])
        start += layout.shape[0]
    return Rows(blobs, [section(lambda _: True, layout) for layout in SECTIONS])


def compressed_of(blobs: Blobs) -> Rows:
    layout = dataclasses.replace(LAYOUT, compression="lz4")
    write_array(blobs, layout, VALUES)
    return Rows(blobs, [section(lambda _: True, layout)])


def rows_of(blobs: Blobs, shards: tuple[int, ...] = (0, 1, 2)) -> Rows:
    write_array(blobs, LAYOUT, VALUES, shards)
    return Rows(blobs, [section(shards.__contains__)])


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


@pytest.mark.parametrize("made", [rows_of, sections_of, compressed_of])
@pytest.mark.parametrize("name", KEYS)
def test_indexing_is_numpys(local: LocalBlobs, name: str, made: Callable[[Blobs], Rows]) -> None:
    key = KEYS[name]
    # NumPy takes an empty list for floats.
    oracle = VALUES[np.array(key, int)] if isinstance(key, list) and not key else None
    if isinstance(key, tuple) and isinstance(key[0] if key else None, list):
        key = (np.array(key[0], int), *key[1:])
    expected = np.asarray(VALUES[key] if oracle is None else oracle)
    found = np.asarray(made(local)[KEYS[name]])
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "name",
    [
        "last",
        "across all shards",
        "backwards",
        "list, unsorted with repeats",
        "mask and position",
        "positions of a row",
    ],
)
@pytest.mark.parametrize("made", [rows_of, sections_of, compressed_of])
def test_indexing_every_storage(blobs: Blobs, name: str, made: Callable[[Blobs], Rows]) -> None:
    np.testing.assert_array_equal(made(blobs)[KEYS[name]], VALUES[KEYS[name]])


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (N, "sequence 37 is out of bounds for 37 sequences"),
        (-N - 1, "sequence -38 is out of bounds for 37 sequences"),
        ([0, 99], "sequence 99 is out of bounds for 37 sequences"),
        ((0, 8), "out of bounds"),
        ((slice(5, 5), 8), "out of bounds"),
        ((0, 0, 0, 0), "too many indices: the array has 3 axes, 4 were indexed"),
        ((..., 0, 0, 0, 0), "too many indices"),
        ((..., ...), "single ellipsis"),
        (1.0, "not 1.0"),
        ([1.5], "sequences are chosen by an integer, a slice, or a list of integers"),
        ("0", "sequences are chosen by"),
        (None, "sequences are chosen by"),
        ([[0, 1]], "sequences are chosen by"),
        (np.ones(N - 1, dtype=bool), r"a mask of sequences must have shape \(37,\), got \(36,\)"),
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
    rows = Rows(local, [section({0, 2}.__contains__)])
    with pytest.raises(NotCommittedError, match="sequences 16:20 of acts/h"):
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


@pytest.mark.parametrize("made", [rows_of, sections_of, compressed_of])
@pytest.mark.parametrize(
    "name",
    [
        "first",
        "all",
        "step",
        "list",
        "mask",
        "row and position",
        "one number",
        "part of d_model",
        "empty slice",
    ],
)
def test_reading_into_memory_that_is_there(
    local: LocalBlobs, name: str, made: Callable[[Blobs], Rows]
) -> None:
    expected = np.asarray(VALUES[KEYS[name]])
    out = np.zeros(expected.shape, "<u2")
    assert made(local).read(KEYS[name], out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("key", "out", "words"),
    [
        (slice(0, 4), np.empty((4, 8, 5), "<u2"), r"of shape \(4, 8, 6\), got uint16 of shape \(4, 8, 5\)"),
        (slice(0, 4), np.empty((4, 8, 6), "<f2"), "got float16"),
        (slice(0, 4), np.empty((4, 6, 8), "<u2").transpose(0, 2, 1), "C-contiguous"),
        (0, np.empty((1, 8, 6), "<u2"), r"of shape \(8, 6\)"),
        (slice(None, None, -1), np.empty((N, 8, 6), "<u2"), "cannot be read backwards into out"),
    ],
)
def test_other_memory_is_refused(local: LocalBlobs, key: Any, out: NDArray[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rows_of(local).read(key, out)


def test_sections_are_one_array(local: LocalBlobs) -> None:
    rows = sections_of(local)
    assert (rows.shape, rows.axes, rows.dtype, rows.path) == (
        VALUES.shape,
        LAYOUT.axes,
        "bfloat16",
        "acts/h",
    )
    assert rows.nbytes == sum(layout.nbytes for layout in SECTIONS)
    assert len(rows) == N


def test_absent_rows_of_a_later_section(local: LocalBlobs) -> None:
    sections_of(local)
    why = "this hook was not extracted over them"
    rows = Rows(
        local,
        [
            Section(SECTIONS[0], lambda _: True),
            Section(SECTIONS[1], {0, 1}.__contains__, why),
            Section(SECTIONS[2], lambda _: False),
        ],
    )
    np.testing.assert_array_equal(rows[3:17], VALUES[3:17])
    with pytest.raises(
        NotCommittedError,
        match=rf"sequences 17:21 of parts/0001/acts/h \(segment 2\) are not committed in {local.url}; {why}$",
    ):
        rows[:]
    with pytest.raises(NotCommittedError, match=rf"sequences 26:27 of parts/0002/acts/h .* in {local.url}$"):
        rows[-1]


@pytest.mark.parametrize(
    "sections",
    [
        (),
        (LAYOUT, dataclasses.replace(LAYOUT, dtype="float16")),
        (LAYOUT, dataclasses.replace(LAYOUT, shape=(N, 8, 7))),
        (LAYOUT, dataclasses.replace(LAYOUT, axes=("sequence", "position", "d_mlp"))),
    ],
)
def test_sections_must_fit(local: LocalBlobs, sections: Sequence[ArrayLayout]) -> None:
    with pytest.raises(ValueError, match="one section|has other rows than acts/h"):
        Rows(local, [section(lambda _: True, layout) for layout in sections])


HUGE = ArrayLayout("acts/h", (10**15, 8, 6), "bfloat16", LAYOUT.axes, 16, 4)


@pytest.mark.parametrize(
    "key",
    [
        slice(None),
        ...,
        slice(None, None, -1),
        slice(None, None, 3),
        slice(10**15, 0, -1000),
        (slice(None), 0),
        (slice(None), slice(0, 0)),
        -1,
        [0, 10**14],
    ],
    ids=str,
)
@pytest.mark.parametrize("shards", [(), (0, 1, 2)])
def test_rows_nobody_wrote_take_no_memory(local: LocalBlobs, shards: tuple[int, ...], key: Any) -> None:
    rows = Rows(local, [section(shards.__contains__, HUGE)])
    tracemalloc.start()
    try:
        with pytest.raises(NotCommittedError):
            rows[key]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_shard_that_cannot_be_takes_no_time(local: LocalBlobs) -> None:
    layout = ArrayLayout("acts/h", (10**15, 8, 6), "bfloat16", LAYOUT.axes, 10**15, 10**15)
    rows = Rows(local, [section(lambda _: True, layout)])
    for key in (slice(None), slice(None, None, 5)):
        with pytest.raises(StorageError, match="committed but missing"):
            rows[key]


class Counting:
    """Storage that is far away, and counts what it is asked for."""

    is_local = False

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.requests: list[tuple[str, int, int]] = []

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> bytes | NDArray[np.uint8]:
        data = self._blobs.read(key, start, nbytes)
        self.requests.append((key, start, len(data)))
        return data

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        self.requests.append((key, start, out.nbytes))
        self._blobs.read_into(key, start, out)

    def head(self, key: str) -> BlobInfo | None:
        self.requests.append((key, 0, 0))
        return self._blobs.head(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)


ROW, POSITION = LAYOUT.row_nbytes, LAYOUT.row_nbytes // 8


@pytest.mark.parametrize(
    ("key", "sizes"),
    [
        (3, [ROW]),
        (slice(3, 20), [13 * ROW, 4 * ROW]),
        ([3, 4, 5, 20], [3 * ROW, ROW]),
        ((3, 2), [POSITION]),
        ((3, slice(2, 5)), [3 * POSITION]),
        ((3, slice(2, 5), 1), [3 * POSITION]),
        ((slice(14, 18), -1), [POSITION] * 4),
        ((slice(14, 18), slice(None), 1), [2 * ROW, 2 * ROW]),
        ((slice(14, 18), slice(0, 8, 2)), [2 * ROW, 2 * ROW]),
        ((slice(14, 18), slice(4, 4)), []),
    ],
    ids=str,
)
def test_only_what_is_asked_for_is_requested(key: Any, sizes: list[int]) -> None:
    far: Any = Counting(open_blobs(f"memory://{uuid.uuid4().hex}"))
    rows = rows_of(far)
    far.requests.clear()
    np.testing.assert_array_equal(rows[key], VALUES[key])
    assert sorted(n for _, _, n in far.requests) == sorted(sizes)


def test_positions_of_many_narrow_rows_take_few_requests() -> None:
    layout = dataclasses.replace(LAYOUT, shape=(80, 8, 6), shard_rows=40)
    far: Any = Counting(open_blobs(f"memory://{uuid.uuid4().hex}"))
    values = random_bits(layout)
    write_array(far, layout, values)
    np.testing.assert_array_equal(Rows(far, [section(lambda _: True, layout)])[:, 3], values[:, 3])
    assert [n for _, _, n in far.requests] == [40 * ROW] * 2


@pytest.mark.parametrize("nbytes_of", [None, "given"])
def test_index_of_a_compressed_shard_is_read_once(nbytes_of: Any) -> None:
    layout = dataclasses.replace(LAYOUT, compression="lz4")
    far: Any = Counting(open_blobs(f"memory://{uuid.uuid4().hex}"))
    write_array(far, layout, VALUES)
    sizes = {shard: far.head(layout.key(shard)).nbytes for shard in range(3)}
    far.requests.clear()
    rows = Rows(far, [Section(layout, lambda _: True, nbytes_of=sizes.__getitem__ if nbytes_of else None)])
    for _ in range(3):
        np.testing.assert_array_equal(rows[2:15], VALUES[2:15])
    heads_and_indices = [n for _, _, n in far.requests if n in (0, layout.index_nbytes)]
    assert heads_and_indices == ([] if nbytes_of else [0]) + [layout.index_nbytes]
    assert len(far.requests) == len(heads_and_indices) + 3  # neighbouring chunks come in one request


def large_of(blobs: Blobs, compression: Any) -> tuple[Rows, NDArray[Any]]:
    """Rows of 256 KiB: whole reads are cut and shared by threads."""
    layout = ArrayLayout("acts/h", (40, 32, 4096), "bfloat16", LAYOUT.axes, 16, 2, compression)
    values = np.arange(40 * 32 * 4096, dtype="<u4").astype("<u2").reshape(layout.shape)
    write_array(blobs, layout, values)
    return Rows(blobs, [section(lambda _: True, layout)]), values


@pytest.mark.parametrize("compression", [None, "lz4"])
@pytest.mark.parametrize("url", ["local", "memory"])
def test_large_reads_are_shared_by_threads(local: LocalBlobs, compression: Any, url: str) -> None:
    blobs: Any = local if url == "local" else open_blobs(f"memory://{uuid.uuid4().hex}")
    rows, values = large_of(blobs, compression)
    for key in (
        slice(None),
        slice(3, 37),
        slice(None, None, -1),
        [30, 2, 3, 4, 39],
        (slice(None), slice(7, 9)),
    ):
        np.testing.assert_array_equal(rows[key], values[key])
    blobs.delete("acts/h/c.1.0.0")
    with pytest.raises(BlobNotFoundError, match="is committed but missing"):
        rows[:]
    np.testing.assert_array_equal(rows[:16], values[:16])


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 8, 16, 17, 40])
def test_steps_look_at_every_shard_that_they_touch(step: int) -> None:
    """Before any row is read: one that is not committed must not be passed over."""
    layouts = [example_plan(n_sequences=n).activations(example_plan().request.hooks[0]) for n in (37, 16, 21)]
    sections = Sections(layouts)
    for start in range(20):
        rows = range(start, sections.starts[-1], step)
        touched = {(section, row // 16) for section, row in map(sections.find, rows)}
        assert {(section, part.shard) for section, part in sections.shards(rows)} == touched

"""Counting valid rows, compared with a list of them in NumPy."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore.loader.dropping.valid_rows import AllRows, MarkedRows, SamePositions, ValidRows


def check(rows: ValidRows, is_valid: NDArray[np.bool_]) -> None:
    listed = np.flatnonzero(is_valid)
    assert (rows.n_rows, rows.n_valid) == (len(is_valid), len(listed))
    np.testing.assert_array_equal(rows.select(np.arange(len(listed))), listed)
    before = np.concatenate([[0], np.cumsum(is_valid)])
    np.testing.assert_array_equal(rows.rank(np.arange(len(is_valid) + 1)), before)


def pieces(mask: NDArray[np.bool_], size: int) -> Iterator[NDArray[np.bool_]]:
    return (mask[start : start + size] for start in range(0, len(mask), size))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("n", [1, 7, 8, 63, 64, 511, 512, 513, 5_000, 100_000])
def test_marked(n: int, share: float) -> None:
    mask = np.random.default_rng(n).random(n) < share
    check(MarkedRows(n, pieces(mask, 1_000)), mask)


def test_far_apart() -> None:
    mask = np.zeros(1 << 20, bool)
    mask[[0, 5, 1 << 19, (1 << 20) - 1]] = True
    check(MarkedRows(len(mask), pieces(mask, 1 << 14)), mask)


class Looked(np.ndarray[Any, Any]):
    """An array that counts the look-ups in it."""

    n_lookups = 0

    def __getitem__(self, key: Any) -> Any:
        Looked.n_lookups += 1
        return super().__getitem__(key)


def test_a_gap_is_not_walked_through() -> None:
    mask = np.ones(1 << 24, bool)
    mask[500 : (1 << 24) - 500] = False
    rows = MarkedRows(len(mask), iter([mask]))
    rows._counts = rows._counts.view(Looked)
    Looked.n_lookups = 0
    np.testing.assert_array_equal(rows.select(np.arange(1_000)), np.flatnonzero(mask))
    assert Looked.n_lookups < 10


@given(st.lists(st.booleans(), min_size=1, max_size=2_000), st.integers(1, 300))
def test_marked_in_pieces_of_any_size(mask: list[bool], size: int) -> None:
    values = np.array(mask)
    check(MarkedRows(len(values), pieces(values, size)), values)


def test_order_of_ranks_does_not_matter() -> None:
    mask = np.random.default_rng(0).random(20_000) < 0.7
    rows = MarkedRows(len(mask), pieces(mask, 4_096))
    ranks = np.random.default_rng(1).integers(0, rows.n_valid, 5_000)
    np.testing.assert_array_equal(rows.select(ranks), np.flatnonzero(mask)[ranks])
    assert rows.select(np.array([], np.int64)).shape == (0,)


@pytest.mark.parametrize("positions", [[0], [1, 2, 3], [0, 3, 4, 6]])
def test_same_positions(positions: list[int]) -> None:
    mask = np.zeros(7, bool)
    mask[positions] = True
    check(SamePositions(11, mask), np.tile(mask, 11))


def test_all_rows() -> None:
    check(AllRows(100), np.ones(100, bool))


def test_memory() -> None:
    rows = MarkedRows(1 << 22, pieces(np.ones(1 << 22, bool), 1 << 20))
    assert rows.nbytes < (1 << 22) * 0.19
    assert AllRows(10**12).nbytes == 0


@pytest.mark.parametrize("n", [999, 1_001])
def test_masks_of_another_number_of_rows(n: int) -> None:
    with pytest.raises(ValueError, match=f"there are {n} rows, and the masks are of 1000"):
        MarkedRows(n, iter([np.ones(1_000, bool)]))

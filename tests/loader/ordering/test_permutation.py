"""The computed permutation: a bijection, the same everywhere, without a pattern that statistics can find."""

import numpy as np
import pytest
from numpy.typing import NDArray

from actstore.loader.ordering.permutation import Permutation


def chi_square(counts: NDArray[np.int64], expected: float) -> float:
    """Deviation from independent draws in standard deviations, by the normal approximation."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 255, 256, 257, 1_000, 4_097, 65_536, 1_000_003])
def test_each_number_comes_out_once(n: int) -> None:
    images = Permutation(n, 5)(np.arange(n))
    np.testing.assert_array_equal(np.sort(images), np.arange(n))


def test_golden_values() -> None:
    # Recorded once. If they changed, no training could be resumed, and releases would not agree.
    assert Permutation(10, 0)(np.arange(10)).tolist() == [7, 4, 3, 8, 0, 5, 2, 9, 6, 1]
    assert Permutation(1_000_000, 7, 3)(np.arange(5)).tolist() == [273160, 62195, 179702, 90387, 219801]
    assert Permutation(10**12, 7, 3)(np.array([0, 1, 10**12 - 1])).tolist() == [
        528271293002,
        153652393965,
        782069238229,
    ]


def test_any_part_in_any_order() -> None:
    permutation = Permutation(50_000, 1, 2)
    whole = permutation(np.arange(50_000))
    some = np.array([[49_999, 0], [17, 17]])
    np.testing.assert_array_equal(permutation(some), whole[some])
    assert permutation(np.array([], np.int64)).shape == (0,)
    # Results that are too large are permuted again: one by one if there are few, side by side if many.
    parts = [permutation(part) for part in np.split(np.arange(50_000), 500)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("n", [10**12 + 1, 2**62])
def test_large_numbers_one_by_one_and_side_by_side(n: int) -> None:
    permutation = Permutation(n, 3)
    indices = np.arange(0, n, n // 2_000)
    parts = [permutation(part) for part in np.array_split(indices, 200)]
    np.testing.assert_array_equal(np.concatenate(parts), permutation(indices))


def test_every_part_of_the_key_counts() -> None:
    permutations = [
        Permutation(1_000, *key)(np.arange(1_000)) for key in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 0)]
    ]
    for i, left in enumerate(permutations):
        for right in permutations[:i]:
            # Two independent permutations agree at one place on average.
            assert (left == right).sum() < 10


@pytest.mark.parametrize("n", [1_000, 30_011, 1_000_000])
def test_places_do_not_tell_numbers(n: int) -> None:
    # Cells of a square (place by number), over several keys: each must be as full as any other.
    n_cells, n_keys = 10, 20
    counts = np.zeros((n_cells, n_cells), np.int64)
    for key in range(n_keys):
        images = Permutation(n, key)(np.arange(n))
        np.add.at(counts, (np.arange(n) * n_cells // n, images * n_cells // n), 1)
    # Row and column sums are fixed; the rest is free.
    deviation = ((counts - n * n_keys / n_cells**2) ** 2 / (n * n_keys / n_cells**2)).sum()
    freedom = (n_cells - 1) ** 2
    assert abs(deviation - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1_000, 65_536, 1_000_003, 10**10])
def test_neighbours_do_not_stay_together(n: int) -> None:
    n_places = min(n, 1 << 18)
    images = Permutation(n, 11)(np.arange(n_places))
    steps = np.diff(images) % n
    counts = np.histogram(steps, bins=50, range=(0, n))[0]
    assert abs(chi_square(counts, (n_places - 1) / 50)) < 5


def test_small_permutations_are_all_as_likely() -> None:
    n_keys = 24 * 200
    permutations = [tuple(Permutation(4, key)(np.arange(4)).tolist()) for key in range(n_keys)]
    counts = np.array([permutations.count(which) for which in set(permutations)])
    assert len(counts) == 24
    assert abs(chi_square(counts, n_keys / 24)) < 5


@pytest.mark.parametrize("n", [0, -1, (1 << 62) + 1])
def test_refused(n: int) -> None:
    with pytest.raises(ValueError, match=r"of 1 to 2\^62 numbers"):
        Permutation(n, 0)

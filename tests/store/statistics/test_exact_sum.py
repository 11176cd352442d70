"""Exact sums compared with rational arithmetic."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.store.statistics.exact_sum import ExactSum

ALLOWED = st.floats(-1e250, 1e250)


def exact_sum(rows: list[list[float]]) -> list[float]:
    total = ExactSum((len(rows[0]),))
    for row in rows:
        total.add(np.array(row))
    values: list[float] = total.value().tolist()
    return values


def nearest(terms: list[float]) -> float:
    """The sum of finite terms, rounded once."""
    return float(sum(Fraction(term) for term in terms))


@given(st.lists(st.lists(ALLOWED, min_size=3, max_size=3), min_size=1, max_size=12))
def test_each_element_is_the_rounded_exact_sum(rows: list[list[float]]) -> None:
    assert exact_sum(rows) == [nearest(list(column)) for column in zip(*rows, strict=True)]


@given(st.lists(ALLOWED, min_size=1, max_size=12), st.randoms())
def test_order_does_not_matter_to_the_last_bit(terms: list[float], rng: random.Random) -> None:
    shuffled = rng.sample(terms, len(terms))
    one, other = (np.array(exact_sum([[term] for term in order])) for order in (terms, shuffled))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("terms", "total"),
    [
        ([1.0, 1e100, 1.0, -1e100], 2.0),
        # Above half-way, by the least that there is.
        ([2.0**53, 1.0, 2.0**-1074], math.nextafter(2.0**53, math.inf)),
        ([2.0**53, 1.0], 2.0**53),
        ([5e-324, 5e-324], 1e-323),
    ],
)
@pytest.mark.parametrize("step", [1, -1])
def test_extremes(terms: list[float], total: float, step: int) -> None:
    rows = [[term, 1.0] for term in terms[::step]]
    assert exact_sum(rows) == pytest.approx([total, len(terms)], abs=0, rel=0)


def test_zeros_have_one_sign() -> None:
    assert np.signbit(exact_sum([[-0.0]])).tolist() == [False]


def test_wide_ranges_in_many_terms() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 40)) * 10.0 ** rng.integers(-200, 200, (500, 40))
    rows[250:] = -rows[:250] * (1 + 2.0**-50)
    assert exact_sum(rows.tolist()) == [math.fsum(column) for column in rows.T]


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    total = ExactSum(shape)
    assert np.array_equal(total.value(), np.zeros(shape))
    values = np.full(shape, 0.1)
    for _ in range(10):
        total.add(values)
    assert np.array_equal(total.value(), np.full(shape, 1.0))
    assert np.array_equal(values, np.full(shape, 0.1)), "the array that was added is not changed"


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) cannot be added to a sum of shape \(3,\)"):
        ExactSum((3,)).add(np.zeros(2))

"""Records of statistics: merging them in any order, and records that are refused."""

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from numpy.typing import NDArray
from pydantic import ValidationError

from actstore.errors import StorageError
from actstore.store.statistics.array_text import encoded
from actstore.store.statistics.hook_statistics import HookStatistics, Statistics
from actstore.store.statistics.merging import combined, merge

SHAPE = (2, 3)
NOTHING = HookStatistics.of_tokens(np.empty(0), np.zeros(SHAPE), 0.0, np.zeros((6, 6)))


def record(values: NDArray[np.float64], *, covariance: bool = True) -> HookStatistics:
    """The record of finite values [n, *SHAPE]."""
    flat = values.reshape(-1, 6)
    norms = np.linalg.norm(flat, axis=1)
    max_abs = float(np.abs(flat).max(initial=0))
    return HookStatistics.of_tokens(norms, values.sum(axis=0), max_abs, flat.T @ flat if covariance else None)


def some_values(n: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, *SHAPE)) * rng.lognormal(size=(n, 1, 1)) + 3)


def statistics(n_parts: int = 4) -> tuple[NDArray[np.float64], Statistics]:
    values = some_values(101)
    return values, merge([record(part) for part in np.array_split(values, n_parts)], SHAPE)


VALUES = np_st.arrays(
    np.float64,
    st.tuples(st.integers(0, 6), st.just(2), st.just(3)),
    elements=st.floats(-(2.0**127), 2.0**127, width=32),
)


@given(st.lists(VALUES, max_size=6), st.randoms())
def test_order_does_not_matter_to_the_last_bit(parts: list[NDArray[np.float64]], rng: random.Random) -> None:
    records = [record(part) for part in parts]
    shuffled = rng.sample(records, len(records))
    assert combined(records, SHAPE).model_dump_json() == combined(shuffled, SHAPE).model_dump_json()


def test_numbers_are_those_of_all_values_together() -> None:
    values, merged = statistics()
    flat = values.reshape(-1, 6)
    norms = np.linalg.norm(flat, axis=1)
    assert (merged.count, merged.n_not_finite) == (101, 0)
    np.testing.assert_allclose(merged.mean, values.mean(axis=0), rtol=1e-14)
    assert merged.mean_norm == pytest.approx(norms.mean(), rel=1e-14)
    assert merged.mean_squared_norm == pytest.approx((norms**2).mean(), rel=1e-14)
    assert merged.std_norm == pytest.approx(norms.std(), rel=1e-12)
    assert (merged.max_abs, merged.min_norm, merged.max_norm) == (
        np.abs(flat).max(),
        norms.min(),
        norms.max(),
    )
    for q in (0, 0.25, 0.5, 0.99, 1):
        assert merged.norm_quantile(q) == pytest.approx(np.quantile(norms, q, method="lower"), rel=0.0101)
    assert merged.norm_quantile(0) == norms.min()
    assert merged.covariance is not None
    np.testing.assert_allclose(merged.covariance, np.cov(flat.T, bias=True), rtol=1e-11, atol=1e-12)
    assert np.array_equal(merged.covariance, merged.covariance.T)


def test_a_combined_record_can_be_merged_again() -> None:
    values = some_values(60)
    parts = [record(part) for part in np.array_split(values, 6)]
    direct = merge(parts, SHAPE)
    again = merge([combined(parts[:2], SHAPE), combined(parts[2:], SHAPE)], SHAPE)
    assert again.record.norms == direct.record.norms
    np.testing.assert_allclose(again.mean, direct.mean, rtol=2**-51)
    assert again.mean_norm == pytest.approx(direct.mean_norm, rel=2**-51)
    assert combined([direct.record], SHAPE) == direct.record


def test_tokens_that_are_not_finite_are_only_counted() -> None:
    norms = np.array([1.0, math.nan, math.inf, 2.0])
    both = merge([HookStatistics.of_tokens(norms, np.ones(SHAPE), 1.5), NOTHING], SHAPE)
    assert (both.count, both.n_not_finite, both.mean_norm, both.max_norm) == (2, 2, 1.5, 2.0)
    only = merge([HookStatistics.of_tokens(norms[1:3], np.zeros(SHAPE), 0.0)], SHAPE)
    assert (only.count, only.n_not_finite, only.record.max_abs) == (0, 2, None)


@pytest.mark.parametrize("records", [[], [NOTHING], [NOTHING, NOTHING]])
def test_of_nothing(records: list[HookStatistics]) -> None:
    nothing = merge(records, SHAPE)
    assert nothing.count == 0
    numbers = [nothing.mean_norm, nothing.mean_squared_norm, nothing.std_norm, nothing.max_abs]
    assert np.all(np.isnan([*numbers, nothing.min_norm, nothing.max_norm, nothing.norm_quantile(0.5)]))
    assert nothing.mean.shape == SHAPE
    assert np.isnan(nothing.mean).all()
    assert set(nothing.to_dict()["norm_quantiles"].values()) == {None}
    assert "tokens" in str(nothing)


def test_covariance_needs_the_second_moment_of_every_token() -> None:
    with_moment, without = record(some_values(5)), record(some_values(5), covariance=False)
    assert merge([with_moment, with_moment], SHAPE).covariance is not None
    empty = NOTHING.model_copy(update={"second_moment": None})
    assert merge([empty, with_moment], SHAPE).covariance is not None
    for records in ([without, with_moment], [with_moment, without, with_moment]):
        assert merge(records, SHAPE).covariance is None


def test_shown_as_a_table_and_as_json() -> None:
    values, merged = statistics()
    lines = str(merged).splitlines()
    assert lines[0].split() == ["tokens", "101"]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert repr(merged).startswith("Statistics(count=101, shape=(2, 3), mean_norm=")
    for line in lines:
        assert f">{line[18:].strip()}</td>" in merged._repr_html_()
    fields = json.loads(json.dumps(merged.to_dict(), allow_nan=False))
    np.testing.assert_allclose(fields["mean"], values.mean(axis=0), rtol=1e-14)
    assert fields["norm_quantiles"]["0.5"] == merged.norm_quantile(0.5)


def test_records_read_back() -> None:
    _, merged = statistics()
    text = merged.record.model_dump_json()
    assert HookStatistics.model_validate_json(text) == merged.record
    assert HookStatistics.model_validate_json(text).model_dump_json() == text
    merged.record.check(SHAPE)


FIELDS: dict[str, Any] = json.loads(record(some_values(4)).model_dump_json())


@pytest.mark.parametrize(
    "changes",
    [
        {"count": -1},
        {"count": 2**63},
        {"count": 4.0},
        {"count": True},
        {"n_not_finite": None},
        {"sum": [0.0]},
        {"sum_of_norms": -1.0},
        {"sum_of_norms": math.nan},
        {"sum_of_squared_norms": math.inf},
        {"sum_of_squared_norms": 1e121},
        {"max_abs": "1"},
        {"norms": {"n_zero": 4}},
        {"surplus": 1},
    ],
)
def test_parsing_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HookStatistics.model_validate_json(json.dumps(FIELDS | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sum": encoded(np.zeros(5))}, "sum is damaged: it has 40 bytes where 48 were expected"),
        ({"second_moment": encoded(np.zeros(36))}, "second_moment is damaged: it has 288 bytes where 168"),
        ({"sum": "?"}, "sum is damaged: it is not base64"),
        ({"count": 5}, "5 tokens were counted, and 4 norms"),
        ({"max_abs": None}, "max_abs, min_norm and max_norm are null exactly if"),
        ({"count": 0, "norms": {"n_zero": 0, "buckets": []}}, "are null exactly if no token was counted"),
        ({"min_norm": 1e9}, "min_norm is larger than max_norm"),
    ],
)
def test_check_refuses(changes: dict[str, Any], words: str) -> None:
    damaged = HookStatistics.model_validate_json(json.dumps(FIELDS | changes))
    with pytest.raises(StorageError) as caught:
        damaged.check(SHAPE, "segment 3")
    assert str(caught.value).startswith("segment 3")
    assert words in str(caught.value)
    with pytest.raises(StorageError):
        combined([damaged], SHAPE)


def test_hostile_counts_end_in_a_clear_error() -> None:
    many = {"count": 2**62, "norms": {"n_zero": 2**62, "buckets": []}}
    hostile = HookStatistics.model_validate_json(json.dumps(FIELDS | many))
    with pytest.raises(StorageError, match="they add up to more than can be"):
        combined([hostile, hostile], SHAPE)

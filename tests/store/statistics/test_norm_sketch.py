"""Quantiles from buckets: their precision, and adding up buckets."""

import json
import math
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actstore.store.statistics.norm_sketch import GAMMA, MAX_INDEX, RELATIVE_ACCURACY, NormSketch, SketchSum

NORMS = st.lists(st.one_of(st.just(0.0), st.floats(min_value=1e-45, max_value=1e48)), max_size=40)


def sketch(norms: list[float]) -> NormSketch:
    return NormSketch.of(np.array(norms, dtype=np.float64))


def merged(sketches: Iterable[NormSketch]) -> NormSketch:
    total = SketchSum()
    for part in sketches:
        total.add(part)
    return total.value()


@given(NORMS.filter(bool), st.floats(min_value=0, max_value=1))
def test_quantiles_are_within_one_percent(norms: list[float], q: float) -> None:
    true = sorted(norms)[math.floor(q * (len(norms) - 1))]
    assert abs(sketch(norms).quantile(q) - true) <= RELATIVE_ACCURACY * true * (1 + 1e-9)


@given(NORMS, st.integers(1, 5), st.randoms())
def test_parts_in_any_order_make_the_whole(norms: list[float], n_parts: int, rng: random.Random) -> None:
    parts = [sketch(norms[i::n_parts]) for i in range(n_parts)]
    rng.shuffle(parts)
    assert merged(parts).model_dump_json() == sketch(norms).model_dump_json()


@pytest.mark.parametrize("index", [-5000, -1, 0, 1, 350, 5999])
def test_buckets_are_open_below_and_closed_above(index: int) -> None:
    end = GAMMA**index
    norms = [end * (1 - 1e-9), end * (1 + 1e-9)]
    assert sketch(norms).buckets == ((index, 1), (index + 1, 1))
    assert sketch([1.0]).buckets == ((0, 1),)


def test_all_floats_have_a_bucket() -> None:
    buckets = sketch([5e-324, 1e308]).buckets
    assert buckets == ((-MAX_INDEX, 1), (MAX_INDEX, 1))


def test_of_nothing() -> None:
    empty = sketch([])
    assert (empty.count, empty.buckets) == (0, ())
    assert math.isnan(empty.quantile(0.5))


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_impossible_quantile(q: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        sketch([1.0]).quantile(q)


def test_spelling() -> None:
    text = merged([sketch([0.0, 2.0]), sketch([1.0, 2.0])]).model_dump_json()
    assert json.loads(text) == {"n_zero": 1, "buckets": [[0, 1], [35, 2]]}
    assert NormSketch.model_validate_json(text) == sketch([0.0, 1.0, 2.0, 2.0])


@pytest.mark.parametrize(
    "changes",
    [
        {"n_zero": -1},
        {"n_zero": 2**63},
        {"n_zero": 1.0},
        {"buckets": [[1, 0]]},
        {"buckets": [[1, -3]]},
        {"buckets": [[1, 2**63]]},
        {"buckets": [[6001, 1]]},
        {"buckets": [[-(10**30), 1]]},
        {"buckets": [[2, 1], [1, 1]]},
        {"buckets": [[1, 1], [1, 1]]},
        {"buckets": [[1, 1, 1]]},
        {"buckets": {"1": 1}},
    ],
)
def test_damage_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NormSketch.model_validate_json(json.dumps({"n_zero": 0, "buckets": []} | changes))

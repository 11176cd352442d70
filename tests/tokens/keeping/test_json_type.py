"""Columns of JSON have one type each, whatever the order of their values."""

import itertools
import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import TokensError
from actstore.tokens.keeping.json_type import JsonType


def type_of(values: list[Any]) -> pa.DataType:
    found = JsonType()
    for number, value in enumerate(values):
        found.see(value, f"x in line {number}")
    return found.arrow()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([], pa.null(), id="nothing"),
        pytest.param([None, None], pa.null(), id="null"),
        pytest.param([None, True], pa.bool_(), id="bool"),
        pytest.param([1, None, -(2**63), 2**63 - 1], pa.int64(), id="int64"),
        pytest.param([1, 2.5], pa.float64(), id="float64"),
        pytest.param(["a", "ä", None], pa.string(), id="string"),
        pytest.param([[], [1], None, [None, 2.5]], pa.list_(pa.float64()), id="list"),
        pytest.param([[]], pa.list_(pa.null()), id="empty list"),
        pytest.param(
            [{"b": 1}, {"a": ["x"]}, {}],
            pa.struct([("a", pa.list_(pa.string())), ("b", pa.int64())]),
            id="object",
        ),
    ],
)
def test_the_type_does_not_depend_on_the_order(values: list[Any], expected: pa.DataType) -> None:
    for order in itertools.permutations(values):
        assert type_of(list(order)) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from("abc"), below, max_size=3),
    max_leaves=8,
)


def lacking_keys_are_null(value: Any, type_: Any) -> Any:
    """A value as Arrow gives it back."""
    if isinstance(value, dict):
        return {field.name: lacking_keys_are_null(value.get(field.name), field.type) for field in type_}
    if isinstance(value, list):
        return [lacking_keys_are_null(item, type_.value_type) for item in value]
    return value


@given(st.lists(JSON, max_size=6))
def test_values_that_are_taken_are_given_back(values: list[Any]) -> None:
    values = json.loads(json.dumps(values))
    try:
        type_ = type_of(values)
    except TokensError:
        return
    array: Any = pa.array(values, type=type_)
    there = array.to_pylist()
    assert there == [lacking_keys_are_null(value, type_) for value in values]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "a"], "x in line 1 is a string, and the values before are a number"),
        (["a", True], "x in line 1 is true or false, and the values before are a string"),
        ([True, 1], "x in line 1 is a number, and the values before are true or false"),
        ([[1], ["a"]], "x in line 1 is a string, and the values before are a number"),
        ([{"a": 1}, {"a": [1]}], "x in line 1 is a list, and the values before are a number"),
        ([2**63], "x in line 0 is 9223372036854775808, which is beyond 64 bits"),
        (["\ud800"], "x in line 0 has half a surrogate pair at character 0"),
        ([{"\ud800": 1}], "x in line 0 has half a surrogate pair at character 0"),
        ([{str(key): 1 for key in range(1001)}], "more than 1,000 different keys"),
        ([b"a"], "x in line 0 is a bytes, which cannot be kept"),
    ],
    ids=str,
)
def test_what_has_no_one_type_is_refused_with_its_place(values: list[Any], message: str) -> None:
    with pytest.raises(TokensError, match=message):
        type_of(values)


def test_deep_nesting_is_refused() -> None:
    deep: Any = 1
    for _ in range(18):
        deep = [deep]
    with pytest.raises(TokensError, match="nested more than 16 deep"):
        type_of([deep])

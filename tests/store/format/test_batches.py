"""Which sequences share a batch, against plain sorting, and that nothing but lengths decides it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.store.format.batches import batches_of, places
from actstore.store.format.plan import Request
from tests.store.example import example_plan

LENGTH = 50


def request(batch_size: int, *, by_length: bool) -> Request:
    made = example_plan().request
    tokens = made.tokens.model_copy(update={"context_length": LENGTH})
    batching = "length" if by_length else None
    return made.model_copy(update={"batch_size": batch_size, "tokens": tokens, "batching": batching})


LENGTHS = st.lists(st.integers(1, LENGTH), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 9))
def test_sorted_batches_hold_each_sequence_once_and_fit_their_longest(lengths: list[int], size: int) -> None:
    batches = batches_of(request(size, by_length=True), np.array(lengths, np.int32))
    by_length = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # stable, as sorted is
    assert [row for batch in batches for row in batch.rows.tolist()] == by_length
    for batch in batches[:-1]:
        assert len(batch.rows) == size
    for batch in batches:
        longest = max(lengths[row] for row in batch.rows)
        assert longest <= batch.width <= min(longest + STEP - 1, LENGTH)
        assert batch.width % STEP == 0 or batch.width == LENGTH


STEP = 8


@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_values_come_back_to_their_place(lengths: list[int], size: int, by_length: bool) -> None:
    batches = batches_of(request(size, by_length=by_length), np.array(lengths, np.int32))
    put = np.concatenate([batch.rows for batch in batches])
    place = places(batches)
    assert (put if place is None else put[place]).tolist() == list(range(len(lengths)))
    if not by_length:
        assert place is None


@pytest.mark.parametrize("n", [1, 8, 19])
def test_batches_in_stored_order_are_as_wide_as_the_context(n: int) -> None:
    batches = batches_of(request(8, by_length=False), np.full(n, 3))
    assert [batch.rows.tolist() for batch in batches] == [
        list(range(start, min(start + 8, n))) for start in range(0, n, 8)
    ]
    assert {batch.width for batch in batches} == {LENGTH}

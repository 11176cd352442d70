"""The memory of a segment: the values that go in come out, and nothing else."""

import numpy as np
import pytest
import torch

from actstore.errors import ModelError
from actstore.extraction.computing.buffers import SegmentBuffers
from actstore.store.format.plan import Segment
from tests.store.example import HOOKS, LENGTH, example_plan

A = HOOKS[0]
D = 16


def value(dtype: torch.dtype = torch.float32, length: int = LENGTH) -> torch.Tensor:
    return torch.ones(4, length, D, dtype=dtype)


@pytest.fixture
def buffers() -> SegmentBuffers:
    return SegmentBuffers(example_plan(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (value(torch.float64), "torch.float64 (8, 16) a sequence, planned was torch.float32 (8, 16)"),
        (value(torch.bfloat16), "torch.bfloat16 (8, 16) a sequence, planned was torch.float32 (8, 16)"),
        (value(length=1), "torch.float32 (1, 16) a sequence, planned was torch.float32 (8, 16)"),
    ],
    ids=["wider", "narrower", "one position"],
)
def test_nothing_is_cast_or_spread(buffers: SegmentBuffers, given: torch.Tensor, what: str) -> None:
    buffers.put(A, 0, 4, value())
    with pytest.raises(ModelError) as caught:
        buffers.put(A, 4, 4, given)
    assert str(caught.value) == f"{A} came out as {what}; choose the dtype that the model computes in"


def test_behind_the_last_row_are_zeros_whatever_was_there(buffers: SegmentBuffers) -> None:
    """Otherwise the bytes of a store would depend on which worker computed its last segment."""
    plan = example_plan()
    for start in range(0, plan.segment_size, 4):
        buffers.put(A, start, 4, value())
    assert buffers.rows(plan.segment(0))[A].view(np.float32).all()
    last = plan.segment(plan.n_segments - 1)
    assert 0 < last.n_sequences < plan.segment_size
    rows = buffers.rows(last)[A].view(np.float32)
    assert len(rows) > last.n_sequences
    assert rows[: last.n_sequences].all()
    assert not rows[last.n_sequences :].any()


def test_values_lie_where_they_were_put(buffers: SegmentBuffers) -> None:
    first, second = value(), 2 * value()
    buffers.put(A, 0, 4, first)
    buffers.put(A, 4, 3, second)
    rows = buffers.rows(Segment(0, 0, 7))[A].view(np.float32)
    assert [row.mean() for row in rows[:8]] == [1, 1, 1, 1, 2, 2, 2, 0]
    assert torch.equal(buffers.sequence(5)[A], second[0])


def test_behind_a_narrow_batch_are_zeros_whatever_was_there(buffers: SegmentBuffers) -> None:
    buffers.put(A, 0, 4, value())
    buffers.put(A, 0, 4, value(length=3), 3)
    rows = buffers.rows(Segment(0, 0, 4))[A].view(np.float32)
    assert rows[:4, :3].all()
    assert not rows[:4, 3:].any()
    with pytest.raises(
        ModelError, match=r"came out as torch.float32 \(8, 16\) a sequence, planned was .* \(3, 16\)"
    ):
        buffers.put(A, 0, 4, value(), 3)


def test_rows_come_out_in_stored_order(buffers: SegmentBuffers) -> None:
    for number in range(4):
        buffers.put(A, number, 1, (number + 1) * value())
    rows = buffers.rows(Segment(0, 0, 4), np.array([2, 0, 3, 1]))[A].view(np.float32)
    assert [row.mean() for row in rows[:4]] == [3, 1, 4, 2]

"""Stored norms: their rounding, their place, and which of them count as equal."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from actstore.store.format.batches import Batch
from actstore.store.format.plan import HookArray, Plan
from actstore.store.statistics.moments import Moments, recompute
from actstore.store.statistics.norms import UNSET, difference, rounded, side_by_side
from tests.store.arrays import bits
from tests.store.example import HOOKS, LENGTH, SEGMENT, example_plan

NAN = 0x7FC00000
LARGEST = np.finfo(np.float32).max


def test_rounding_gives_every_nan_the_same_bits() -> None:
    foreign = np.array([0xFFF8000000000001, 0x7FF8000000000123], np.uint64).view(np.float64)
    norms = rounded(np.array([UNSET, *foreign, math.inf, 1e300, 0.1, 0.0]))
    assert bits(norms)[:3].tolist() == [NAN] * 3
    assert norms[3:].tolist() == [math.inf, math.inf, np.float32(0.1), 0.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms_are_of_the_stored_values_and_nan_for_padding(dtype: str) -> None:
    hook = HookArray(name=HOOKS[2], shape=(2, 8), axes=("head", "d_head"))
    values = torch.randn(5, LENGTH, 2, 8, generator=torch.Generator().manual_seed(0))
    values = (values * 100).to(getattr(torch, dtype))
    values[0, 1, 1, 3], values[1, 0, 0, 0], values[2, 0] = math.nan, -math.inf, 0
    lengths = np.array([LENGTH, 3, LENGTH, 1, 5])
    batches = [Batch(np.array([0, 1]), LENGTH), Batch(np.array([4, 2]), LENGTH), Batch(np.array([3]), LENGTH)]
    width = {2: torch.uint16, 4: torch.int32}[values.element_size()]
    _, norms = recompute(hook, values.view(width).numpy(), dtype, lengths, batches)
    exact = np.linalg.norm(values.double().flatten(2).numpy(), axis=2)
    exact[np.arange(LENGTH) >= lengths[:, None]] = math.nan
    assert norms.dtype == np.float32
    np.testing.assert_array_max_ulp(norms, exact.astype(np.float32), maxulp=1)
    assert set(bits(norms[np.isnan(norms)]).tolist()) == {NAN}
    assert (math.isnan(norms[0, 1]), norms[1, 0], norms[2, 0]) == (True, math.inf, 0)


def test_norms_are_those_since_the_last_reset() -> None:
    plan = example_plan(norms=True)
    moments = Moments(plan.request.hooks, "cpu", covariance=False)
    is_real = torch.ones(2, LENGTH, dtype=torch.bool)
    value = torch.randn(2, LENGTH, 16)
    for _ in range(2):
        moments.reset()
        moments.add(HOOKS[0], value, is_real)
        before = moments.norms(LENGTH)[HOOKS[0]]
        moments.add(HOOKS[0], 2 * value, is_real)
        norms = moments.norms(LENGTH)[HOOKS[0]]
        assert norms.shape == (4, LENGTH)
        np.testing.assert_array_equal(norms[:2], before)
        np.testing.assert_array_equal(norms[2:], 2 * before)


def test_hooks_lie_side_by_side_and_what_is_past_the_end_is_zero() -> None:
    plan = example_plan(norms=True)
    norms = {name: np.full((5, LENGTH), number + 1, np.float32) for number, name in enumerate(HOOKS)}
    rows = side_by_side(plan, 2, norms)
    assert rows.shape == (SEGMENT, len(HOOKS), LENGTH)
    np.testing.assert_array_equal(rows[:5], np.broadcast_to([[[1], [2], [3]]], (5, 3, LENGTH)))
    assert not rows[5:].any()


@pytest.mark.parametrize(
    ("stored", "computed", "is_same"),
    [
        (1.0, 1.0, True),
        (np.nextafter(np.float32(1), np.float32(2)), 1.0, True),
        (1.0 + 2**-22, 1.0, False),
        (math.inf, LARGEST, True),
        (math.inf, np.nextafter(LARGEST, np.float32(0)), False),
        (math.nan, math.nan, True),
        (math.nan, math.inf, False),
        (math.nan, 1.0, False),
        (0.0, math.nan, False),
        (-0.0, 0.0, False),
        (-1.0, 1.0, False),
    ],
)
def test_norms_may_differ_by_one_step_of_float32(stored: Any, computed: Any, is_same: bool) -> None:
    left, right = np.ones((2, 3, 4), np.float32)
    left[1, 2], right[1, 2] = stored, computed
    problem = difference(left, right)
    assert (problem is None) is is_same
    assert problem is None or problem.startswith("that of row 1, position 2 is ")


def test_another_nan_is_a_difference() -> None:
    left, right = np.full((2, 1, 1), np.nan, np.float32)
    left.view(np.uint32)[0] = NAN + 1
    assert difference(left, right) is not None


def test_a_plan_without_norms_has_the_bytes_of_versions_that_had_none() -> None:
    plan = example_plan()
    assert b"norms" not in plan.to_bytes()
    assert Plan.from_bytes(plan.to_bytes(), "plan") == plan
    assert b'"norms": true' in example_plan(norms=True).to_bytes()


def test_patterns_and_single_numbers_have_no_norms() -> None:
    scale = HookArray(name="blocks.0.ln1.hook_scale", shape=(1,), axes=("one",))
    pattern = HookArray(
        name="blocks.0.attn.hook_pattern", shape=(2, LENGTH), axes=("head", "source_position")
    )
    plan = example_plan()
    some = plan.request.model_copy(update={"hooks": (scale, *plan.request.hooks, pattern)})
    assert tuple(hook.name for hook in plan.model_copy(update={"request": some}).norm_hooks) == HOOKS
    none = plan.request.model_copy(update={"hooks": (scale, pattern)})
    with pytest.raises(ValueError, match="norms are stored, and no hook has any"):
        Plan(**plan.model_copy(update={"request": none, "norms": True}).__dict__)

"""How far two computations of one row may differ: rounding passes, one wrong position does not."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actstore.extraction.value_checks.agreement import Deviation, deviation, distances, relative_error
from actstore.extraction.value_checks.plain_forward import plain_values
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
LAYER = 15
"""A layer in the middle, where layers differ least."""


@dataclass(frozen=True)
class Row:
    """One row of a batch at the stream of three layers, [position, d_model] each."""

    dtype: str
    is_mixture: bool
    in_batch: dict[int, Tensor]
    alone: dict[int, Tensor]
    other_row: Tensor
    padded_left: Tensor
    layer: int

    def judge(self, values: Tensor) -> Deviation | None:
        return deviation(
            f"blocks.{self.layer}.hook_resid_post",
            values,
            self.in_batch[self.layer],
            self.alone[self.layer],
            dtype=self.dtype,
            is_mixture=self.is_mixture,
        )


def made(model: HookedModel, layer: int, *, is_mixture: bool) -> Row:
    n_rows, length = 8, 32
    tokens = torch.randint(2, model.cfg.d_vocab, (n_rows, length), generator=torch.Generator().manual_seed(0))
    hooks = [f"blocks.{index}.hook_resid_post" for index in (layer - 1, layer, layer + 1)]

    def streams(ids: Tensor, row: int) -> dict[int, Tensor]:
        values = plain_values(model, ids, hooks, rows=[row])
        return {layer + index - 1: values[hook][0] for index, hook in enumerate(hooks)}

    left = torch.cat([torch.zeros(n_rows, 3, dtype=torch.int64), tokens[:, :-3]], dim=1)
    return Row(
        dtype=str(model.dtype).removeprefix("torch."),
        is_mixture=is_mixture,
        in_batch=streams(tokens, 5),
        alone=streams(tokens[5:6], 0),
        other_row=streams(tokens, 4)[layer],
        padded_left=streams(left, 5)[layer],
        layer=layer,
    )


@pytest.fixture(scope="module")
def row(tiny_model: TinyModel, smollm2: Path) -> Callable[[str], Row]:
    """Rows of a real model and of a random mixture, by name and dtype."""

    @cache
    def of(case: str) -> Row:
        name, dtype = case.split("-")
        folder = smollm2 if name == "smollm2" else tiny_model(name)
        model = HookedModel.from_pretrained(
            folder,
            dtype=dtype,
            device="cpu",
            has_head=False,
            n_layers=LAYER + 3 if name == "smollm2" else None,
        )
        return made(model, LAYER if name == "smollm2" else 1, is_mixture=name == "mixtral")

    return of


CASES = [f"{name}-{dtype}" for name in ("smollm2", "mixtral") for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("case", CASES)
def test_rounding_passes(row: Callable[[str], Row], case: str) -> None:
    one = row(case)
    assert one.judge(one.in_batch[one.layer]) is None
    assert one.judge(one.alone[one.layer]) is None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("position", [1, 17, 31])
def test_one_wrong_position_is_found(row: Callable[[str], Row], case: str, position: int) -> None:
    one = row(case)
    right = one.in_batch[one.layer]
    wrong_values = {
        "of another row": one.other_row[position],
        "of the position before": right[position - 1],
        "zeroed": torch.zeros_like(right[position]),
        "of the layer before": one.in_batch[one.layer - 1][position],
        "of the layer behind": one.in_batch[one.layer + 1][position],
        "not a number": torch.full_like(right[position], math.nan),
    }
    for what, value in wrong_values.items():
        values = right.clone()
        values[position] = value
        wrong = one.judge(values)
        assert wrong is not None, what
        assert wrong.position == position, what
        assert not wrong.error <= wrong.allowed


@pytest.mark.parametrize("case", CASES)
def test_whole_rows_that_are_wrong_are_found(row: Callable[[str], Row], case: str) -> None:
    one = row(case)
    right = one.in_batch[one.layer]
    assert one.judge(one.other_row) is not None
    assert one.judge(one.padded_left) is not None
    assert one.judge(right.roll(1, 0)) is not None
    assert one.judge(one.in_batch[one.layer - 1]) is not None
    assert one.judge(one.in_batch[one.layer + 1]) is not None


def test_a_reference_that_disagrees_with_itself_shows_nothing() -> None:
    """Both forwards are read at one place; if it is the wrong one, all values are wrong alike."""
    rows = torch.randn((2, 64, 32), generator=torch.Generator().manual_seed(0))
    for is_mixture in (False, True):
        wrong = deviation(
            "blocks.0.hook_resid_post", rows[0], rows[0], rows[1], dtype="float32", is_mixture=is_mixture
        )
        assert wrong is not None
        assert wrong.error > 1


def test_a_position_that_a_mixture_sends_elsewhere_may_be_as_in_either_forward() -> None:
    in_batch = torch.randn((64, 32), generator=torch.Generator().manual_seed(0))
    alone = in_batch.clone()
    alone[7] = -alone[7]
    for values in (in_batch, alone):
        arguments = ("blocks.0.hook_resid_post", values, in_batch, alone)
        assert deviation(*arguments, dtype="float32", is_mixture=True) is None
        wrong = deviation(*arguments, dtype="float32", is_mixture=False)
        assert wrong is not None
        assert (wrong.position, wrong.allowed) == (7, 1e-3)
        assert wrong.error > 1


def test_errors_are_relative_to_the_size_of_each_position() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 5.0], [8.0, 6.0]])
    values = expected + torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    assert distances(expected, expected).tolist() == [0, 0, 0]
    assert distances(values, expected).tolist() == pytest.approx([0.2, 0, 0.2])
    assert distances(1000 * values, 1000 * expected).tolist() == pytest.approx([0.2, 0, 0.2])
    assert relative_error(values, expected) == pytest.approx(math.sqrt((0.2**2 + 0.2**2) / 3))


def test_a_position_near_zero_is_measured_by_the_median_of_all() -> None:
    expected = torch.tensor([[5.0], [5.0], [1e-6]])
    assert distances(expected + 1e-3, expected).tolist() == pytest.approx([2e-4] * 3, rel=1e-3)


def test_a_few_large_positions_hide_no_other_row() -> None:
    """The first position of a trained model is larger than the rest of the row, and the same in every row."""
    rows = torch.randn((2, 64, 32), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 1000.0
    assert relative_error(rows[0], rows[1]) > 1
    assert (rows[0] - rows[1]).norm() / rows[1].norm() < 0.02


@pytest.mark.parametrize(
    ("value", "is_same"), [(math.inf, False), (math.nan, False), (-math.inf, True), (0.0, False)]
)
def test_values_that_are_not_finite_must_agree(value: float, is_same: bool) -> None:
    expected = torch.tensor([[1.0, -math.inf], [1.0, 2.0]])
    other = expected.clone()
    other[0, 1] = value
    assert distances(other, expected).tolist() == [0.0 if is_same else math.inf, 0.0]
    assert distances(expected, other).tolist() == [0.0 if is_same else math.inf, 0.0]
    assert distances(expected[:, :1], expected).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_step_of_a_scale_is_rounding(dtype: str) -> None:
    scale = torch.full((16, 1), 1.0)
    step = torch.finfo(getattr(torch, dtype)).eps
    arguments = ("blocks.0.ln1.hook_scale", scale * (1 + step), scale, scale)
    assert deviation(*arguments, dtype=dtype, is_mixture=False) is None
    arguments = ("blocks.0.ln1.hook_scale", scale * 1.1, scale, scale)
    assert deviation(*arguments, dtype=dtype, is_mixture=False) is not None


def test_a_value_at_the_edge_of_overflow_may_be_as_in_either_forward() -> None:
    in_batch = torch.randn((8, 4), generator=torch.Generator().manual_seed(0))
    alone = in_batch.clone()
    in_batch[3, 1] = math.inf
    arguments = ("blocks.0.hook_resid_post", in_batch, in_batch, alone)
    assert deviation(*arguments, dtype="float16", is_mixture=False) is None
    arguments = ("blocks.0.hook_resid_post", -in_batch, in_batch, alone)
    assert deviation(*arguments, dtype="float16", is_mixture=False) is not None


@pytest.mark.parametrize("case", ["smollm2-bfloat16"])
def test_other_kernels_pass_and_neighbouring_layers_do_not(row: Callable[[str], Row], case: str) -> None:
    """Errors as large as those of sums in another order, for SmolLM2 in bfloat16."""
    one = row(case)
    right = one.in_batch[one.layer]
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(0))
    moved = right + (0.046 * noise * right.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)).to(
        right.dtype
    )
    assert one.judge(moved) is None
    arguments = (
        f"blocks.{one.layer}.hook_resid_post",
        one.in_batch[one.layer - 1],
        right,
        one.alone[one.layer],
    )
    assert deviation(*arguments, dtype=one.dtype, is_mixture=False, is_other_machine=True) is not None

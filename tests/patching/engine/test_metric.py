"""Metrics of users: what they may do with logits, what they may give, and which positions they can ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actstore import patching
from actstore.errors import PatchError
from actstore.hooks.model import HookedModel
from actstore.patching.engine.metric import measured, positions_of

TinyModel = Callable[..., Path]


@pytest.mark.parametrize("hook", ["resid_pre", "z"])
def test_a_metric_may_change_its_logits(tiny_model: TinyModel, hook: str) -> None:
    """Prompts that a cell does not change have the logits of the recorded run, and not what a metric left there."""
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    corrupted = torch.randint(2, 300, (2, 6), generator=torch.Generator().manual_seed(1))
    clean = corrupted.clone()
    clean[1, 2] = 7

    def apart(logits: Tensor) -> Tensor:
        return (logits - logits.mean(-1, keepdim=True))[..., 5].sum(1)

    def in_place(logits: Tensor) -> Tensor:
        logits -= logits.mean(-1, keepdim=True)
        numbers = logits[..., 5].sum(1)
        logits.fill_(100.0)
        return numbers

    expected = patching.grid(model, corrupted, clean, apart, hook)
    result = patching.grid(model, corrupted, clean, in_place, hook)
    assert result.engine == "packed rows"
    torch.testing.assert_close(result.values, expected.values, atol=1e-5, rtol=0)


def test_a_metric_may_change_its_logits_where_nothing_is_sent(tiny_model: TinyModel) -> None:
    """Paths from senders that are as they were leave the recorded logits to the next cell."""
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    ids = torch.arange(2, 8)[None]

    def in_place(logits: Tensor) -> Tensor:
        number = logits[0, -1, 5].clone()
        logits.fill_(100.0)
        return number

    result = patching.path_patch(model, ids, ids, in_place, "mlps", ["logits"])
    assert result.engine == "packed rows"
    assert torch.equal(result.values, result.corrupted.expand(3))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "the metric gave NoneType"),
        ("1", "the metric gave str"),
        (torch.zeros(2) * 1j, "the metric gave complex numbers"),
        (torch.zeros(2, 1), r"the metric gave shape \[2, 1\] for logits \[2, 3, 4\]"),
    ],
)
def test_what_is_no_number_is_an_error(value: Any, reason: str) -> None:
    with pytest.raises(PatchError, match=reason):
        measured(lambda _logits: value, torch.zeros(2, 3, 4))


def test_numbers_of_any_kind_are_taken() -> None:
    logits = torch.zeros(2, 3, 4)
    one: list[Any] = [1.5, np.float64(1.5), torch.tensor([[1.5]]), np.array(1.5, dtype=np.float16)]
    two: list[Any] = [
        [1.5, 2],
        np.array([1.5, 2]),
        torch.tensor([1.5, 2]).bfloat16(),
        [torch.tensor(1.5), torch.tensor(2.0)],
    ]
    for values, expected in ((one, [1.5]), (two, [1.5, 2.0])):
        for value in values:
            assert measured(lambda _logits, value=value: value, logits).tolist() == expected  # type: ignore[misc]


def test_positions_are_whole_numbers_of_any_kind() -> None:
    kinds: list[Any] = [
        -1,
        np.int64(-1),
        torch.tensor(-1),
        [8],
        np.array([8]),
        torch.tensor([-1]),
        range(8, 9),
    ]
    for given in kinds:
        positions = positions_of(given, 9)
        assert positions == [8]
        assert type(positions[0]) is int
    others: list[Any] = [1.5, [1.5], "-1"]
    for given in others:
        with pytest.raises(PatchError, match="give whole numbers, such as -1"):
            positions_of(given, 9)

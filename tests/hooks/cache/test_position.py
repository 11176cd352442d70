"""Choosing positions, rows and neurons: the result is that of Python's indexing, or an error of one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actstore.errors import HookError
from actstore.hooks.cache.position import at_positions, indices
from actstore.hooks.model import HookedModel

VALUE = torch.arange(24).view(2, 6, 2)

CHOICES: list[tuple[Any, Any]] = [
    (2, 2),
    (-1, -1),
    (np.int64(3), 3),
    (torch.tensor(3), 3),
    ((2,), slice(2)),
    ((1, 5), slice(1, 5)),
    ((1, 5, 2), slice(1, 5, 2)),
    ((None, -1), slice(None, -1)),
    (slice(-2, None), slice(-2, None)),
    (slice(4, 100), slice(4, 100)),
    ([0, -1, 2], [0, -1, 2]),
    (np.array([1, 4]), [1, 4]),
    (torch.tensor([1, 4]), [1, 4]),
    (range(1, 3), [1, 2]),
    (None, slice(None)),
]


@pytest.mark.parametrize(("chosen", "index"), CHOICES)
def test_choices_are_those_of_indexing(chosen: Any, index: Any) -> None:
    assert torch.equal(at_positions(VALUE, chosen, axis=1), VALUE[:, index])
    assert torch.equal(at_positions(VALUE, chosen, axis=-2), VALUE[:, index])
    flat = np.arange(6)[index]
    assert indices(chosen, 6, "row") == np.atleast_1d(flat).tolist()


REFUSED: list[tuple[Any, str]] = [
    ([], r"\[\] chooses none of the 6 positions"),
    ((2, 2), "chooses none of the 6 positions"),
    (slice(6, 9), "chooses none of the 6 positions"),
    (slice(None, None, -1), "runs backwards; choose positions forwards"),
    ((4, 1, -1), "runs backwards"),
    (slice(None, None, 0), "its step is at least 1"),
    (("a", 3), "its ends are integers"),
    ((1.5, 3), "its ends are integers"),
    ((1, 2, 3, 4), "is no .start, stop, step."),
    ((), "is no .start, stop, step."),
    (6, "position 6 is outside of the 6 positions"),
    ([0, -7], "position -7 is outside of the 6 positions"),
    (True, "positions are True; give an integer"),
    ([True, False, True, False, True, False], "positions are .True, False.*; give an integer"),
    (torch.ones(6, dtype=torch.bool), "positions are Tensor of torch.bool"),
    (np.ones(6, dtype=bool), "positions are ndarray of bool"),
    (1.5, "positions are 1.5; give an integer"),
    ("ab", "positions are 'ab'; give an integer"),
    ([1.5], "positions are .1.5."),
]


@pytest.mark.parametrize(("chosen", "message"), REFUSED)
def test_what_chooses_nothing_is_refused(chosen: Any, message: str) -> None:
    with pytest.raises(HookError, match=message) as caught:
        at_positions(VALUE, chosen, axis=1)
    assert "\n" not in str(caught.value)


def test_a_run_refuses_before_it_computes(tiny_model: Callable[..., Path]) -> None:
    model = HookedModel.from_pretrained(str(tiny_model("llama")), device="cpu")
    calls: list[str] = []
    model.add_hook("hook_embed", lambda value, hook: calls.append(hook.name))
    tokens = torch.arange(6)[None]
    for chosen, message in REFUSED:
        with pytest.raises(HookError, match=message):
            model.run_with_cache(tokens, pos_slice=chosen)
    assert not calls
    model.reset_hooks()

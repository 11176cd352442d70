"""Steering adds a direction where PyTorch's hooks on a plain Hugging Face model add it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.errors import PatchError
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(4))
VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


def test_logits_are_those_of_a_plain_model_with_the_direction_added(folder: Path) -> None:
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    cases: list[tuple[Any, Any]] = [
        (None, slice(None)),
        (-2, slice(5, 6)),
        ([1, 3, -6], [1, 3]),  # -6 is 1, which is steered once
        (slice(2, None), slice(2, 7)),
    ]
    for positions, chosen in cases:

        def add(_module: Any, _args: Any, out: Tensor, chosen: Any = chosen) -> Tensor:
            out = out.clone()
            out[:, chosen] += 2.5 * VECTOR
            return out

        handle = plain.model.layers[1].register_forward_hook(add)
        with torch.no_grad():
            expected = plain(TOKENS).logits
        handle.remove()
        for hook in (1, "blocks.1.hook_resid_post", ("resid_post", 1)):
            pair = patching.steering(VECTOR, hook, 2.5, positions)
            torch.testing.assert_close(model.run_with_hooks(TOKENS, fwd_hooks=[pair]), expected)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS).logits)
    heads = patching.steering(torch.ones(4, 16), ("z", 0))
    assert not torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[heads]), model(TOKENS))


def test_gradients_flow_back_to_the_direction(folder: Path) -> None:
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    vector = VECTOR.clone().requires_grad_()

    def loss(vector: Tensor) -> Tensor:
        with model.hooks([patching.steering(vector, 1, 0.5, -1)]):
            value: Tensor = model(TOKENS, grad=True)[:, -1, 5].sum()
        return value

    (gradient,) = torch.autograd.grad(loss(vector), vector)
    step = torch.zeros(64)
    step[9] = 1e-2
    slope = (loss(VECTOR + step) - loss(VECTOR - step)) / 2e-2
    torch.testing.assert_close(gradient[9], slope.detach(), atol=1e-3, rtol=1e-2)


def test_a_direction_is_the_difference_of_means(folder: Path) -> None:
    """Over the last token of each text, whatever its length, or over all of its tokens."""
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    positive, negative = ["I love this", "What a wonderful day it is", "so good"], ["I hate it", "bad"]

    def values(text: str) -> Tensor:
        with torch.no_grad():
            out = plain(model.to_tokens(text), output_hidden_states=True)
        value: Tensor = out.hidden_states[2][0]
        return value

    def mean(texts: list[str], of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([of(values(text)) for text in texts]).mean(0)

    last = mean(positive, lambda value: value[-1]) - mean(negative, lambda value: value[-1])
    whole = mean(positive, lambda value: value.mean(0)) - mean(negative, lambda value: value.mean(0))
    for max_tokens in (None, 5):
        kinds: list[tuple[Any, Tensor]] = [(-1, last), ("mean", whole)]
        for position, expected in kinds:
            vector = patching.steering_vector(
                model, positive, negative, 1, position=position, max_tokens=max_tokens
            )
            torch.testing.assert_close(vector, expected)
    ids = patching.steering_vector(model, TOKENS, TOKENS[:1], ("z", 1))
    assert ids.shape == (4, 16)


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    for vector, hook, positions, text in [
        (torch.ones(63), 1, None, r"shape \[63\], and blocks\.1\.hook_resid_post has \[64\]"),
        (torch.ones(()), 1, None, r"shape \[\]"),
        (VECTOR, 1, 7, "positions holds 7"),
        (VECTOR, 1, [0, -8], "positions holds -8"),
    ]:
        with pytest.raises(PatchError, match=text):
            model.run_with_hooks(TOKENS, fwd_hooks=[patching.steering(vector, hook, 1.0, positions)])
    whole = model.run_with_hooks(TOKENS, fwd_hooks=[patching.steering(VECTOR, 1, 1.0, 3)])
    place: Any
    for place in (np.int64(3), torch.tensor(3), np.array([3, -4, 3])):
        same = model.run_with_hooks(TOKENS, fwd_hooks=[patching.steering(VECTOR, 1, 1.0, place)])
        assert torch.equal(same, whole)
    with pytest.raises(PatchError, match="a prompt has 3 tokens"):
        patching.steering_vector(model, TOKENS, TOKENS[:, :3], 1, position=5)
    with pytest.raises(PatchError, match="no value for a position"):
        patching.steering_vector(model, TOKENS, TOKENS, ("pattern", 1))
    with pytest.raises(PatchError, match="no tokens"):
        patching.steering_vector(model, [], TOKENS, 1)

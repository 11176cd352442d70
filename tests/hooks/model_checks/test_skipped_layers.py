"""Forwards from a layer on, in families without an entry in the table: right, or refused."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore.errors import HookError
from actstore.hooks.model import HookedModel
from tests.hooks.causal_types import tiny_config

TOKENS = torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def model(model_type: str) -> HookedModel:
    torch.manual_seed(0)
    return HookedModel(AutoModelForCausalLM.from_config(tiny_config(model_type)).eval())


@pytest.mark.parametrize("model_type", ["olmo2", "falcon", "mamba", "granite"])
def test_models_that_hand_on_nothing_but_the_stream(model_type: str) -> None:
    other = model(model_type)
    expected = other(TOKENS)
    for layer in (0, 1, 2, 3):
        stream = other(TOKENS, stop_at_layer=layer)
        torch.testing.assert_close(other(stream, start_at_layer=layer), expected, rtol=1e-4, atol=1e-5)


def test_models_that_hand_on_more_are_refused() -> None:
    """The last layer adds what the first one has computed, as families do that share keys or states."""
    other = model("olmo2")
    given: list[Tensor] = []

    def hand_on(_module: object, _args: object, output: Tensor) -> None:
        given[:] = [output]

    def add(_module: object, _args: object, output: Tensor) -> Tensor:
        return output + given.pop() if given else output

    other.layers[0].mlp.register_forward_hook(hand_on)
    other.layers[2].mlp.register_forward_hook(add)
    stream = other(TOKENS, stop_at_layer=2)
    with pytest.raises(HookError, match="need more of those before them than the residual stream"):
        other(stream, start_at_layer=2)


@pytest.mark.parametrize("model_type", ["cohere", "falcon", "mamba", "olmo2", "rwkv"])
def test_generation_with_hooks(model_type: str) -> None:
    """Tokens are those of forwards over all positions, with an edit of the stream."""
    other = model(model_type)
    vector = torch.randn(other.cfg.d_model, generator=torch.Generator().manual_seed(1)) * 3
    with other.hooks([("blocks.1.hook_resid_post", lambda value, hook: value + vector)]):
        expected = TOKENS
        for _ in range(5):
            expected = torch.cat([expected, other(expected)[:, -1:].argmax(-1)], dim=1)
        tokens = other.generate(TOKENS, 5, do_sample=False, stop_at_eos=False)
    assert torch.equal(tokens, expected)
    again, cache = other.generate(
        TOKENS, 5, do_sample=False, stop_at_eos=False, names_filter=("resid_post", 2)
    )
    _, whole = other.run_with_cache(again, names_filter=("resid_post", 2))
    torch.testing.assert_close(cache["resid_post", 2], whole["resid_post", 2], rtol=1e-4, atol=1e-5)

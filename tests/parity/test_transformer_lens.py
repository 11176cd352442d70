"""Our hook values against TransformerLens, on tiny models of each family."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actstore.hooks.model import HookedModel, load_config, resolve_hooks


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox"])
def test_equal_to_transformer_lens(tiny_model: Callable[..., Path], model_type: str) -> None:
    folder = tiny_model(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(str(folder), dtype=torch.float32, device="cpu")
    config = load_config(str(folder))
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    hooks = resolve_hooks(config, ["blocks.*"])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        _, cache = bridge.run_with_cache(tokens)

    values: dict[str, torch.Tensor] = {}
    model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")
    model.run(tokens, hooks, lambda name, value: values.update({name: value.clone()}))
    for name in hooks:
        # TransformerLens re-implements attention eagerly; ours is sdpa. 5e-5 is its own tolerance in float32.
        assert (values[name] - cache[name]).abs().max() <= 5e-5 * (1 + cache[name].abs().max()), name

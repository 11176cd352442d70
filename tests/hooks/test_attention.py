"""The tap on attention, where no family of the table goes: sinks, and masks that are no tensors."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actstore.errors import ModelError
from actstore.hooks.attention import tap
from actstore.hooks.visitor import Finished, Handing


def test_sinks_and_windows_are_in_the_pattern() -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=3,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
        expected = model(tokens, output_attentions=True).attentions
        found: dict[str, torch.Tensor] = {}
        modules = {layer.self_attn: {"pattern": str(i)} for i, layer in enumerate(model.model.layers)}
        visitor = Handing(["0", "1"], lambda name, value: found.update({name: value.clone()}))
        with tap(modules, visitor), pytest.raises(Finished):
            model(tokens)
    for i, weights in enumerate(expected):
        torch.testing.assert_close(found[str(i)], weights)
        assert (found[str(i)].sum(-1) < 0.999).any()  # the sink has a share


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    attention = model.model.layers[0].self_attn
    states = torch.zeros(1, 4, 32)
    turns = model.model.rotary_emb(states, torch.arange(4)[None])
    with (
        tap({attention: {"pattern": "pattern"}}, Handing(["pattern"], lambda *_: None)),
        pytest.raises(
            ModelError, match="whose mask is a dict; load the model with attention='sdpa' or 'eager'"
        ),
    ):
        attention(states, turns, {"a mask": "of blocks"})

"""The tap on attention where no family of the table leads: sinks, and masks that are no tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from actstore.errors import ModelError
from actstore.hooks.capture.attention import tap
from actstore.hooks.capture.exclusive import Turn
from actstore.hooks.capture.visitor import Finished, Handing


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
        values: dict[str, torch.Tensor] = {}
        modules = {layer.self_attn: {"pattern": str(i)} for i, layer in enumerate(model.model.layers)}
        visitor = Handing(["0", "1"], lambda name, value: values.update({name: value.clone()}))
        with tap(modules, visitor, Turn(model.base_model)), pytest.raises(Finished):
            model(tokens)
    for i, weights in enumerate(expected):
        torch.testing.assert_close(values[str(i)], weights)
        assert (values[str(i)].sum(-1) < 0.999).any()  # the sink has a share


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    attention = model.model.layers[0].self_attn
    states = torch.zeros(1, 4, 32)
    turns = model.model.rotary_emb(states, torch.arange(4)[None])
    with (
        tap(
            {attention: {"pattern": "pattern"}},
            Handing(["pattern"], lambda *_: None),
            Turn(model.base_model),
        ),
        pytest.raises(
            ModelError, match="whose mask is a dict; load the model with attention='sdpa' or 'eager'"
        ),
    ):
        attention(states, turns, {"a mask": "of blocks"})


def test_the_rule_where_the_kernel_is_told_and_there_is_no_mask() -> None:
    """Like flash attention, the kernel gets window and direction and no mask; the tap must find the same pattern."""

    def kernel(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        position = torch.arange(query.shape[2])
        back = position[:, None] - position
        seen = (back >= 0) & (back < (options["sliding_window"] or len(position)))
        key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
        scores = query @ key.transpose(2, 3) * options["scaling"]
        return (torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value).transpose(1, 2), None

    AttentionInterface.register("told", kernel)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    for window in (None, 1, 4):
        config = AutoConfig.for_model(
            "mistral", vocab_size=100, intermediate_size=32, sliding_window=window, pad_token_id=None, **shape
        )
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        values: dict[str, Tensor] = {}
        modules = {layer.self_attn: {"pattern": str(i)} for i, layer in enumerate(model.model.layers)}
        visitor = Handing(["0", "1"], lambda name, value: values.update({name: value.clone()}))  # noqa: B023
        with torch.no_grad():
            output = model(tokens, output_attentions=True)
            model.set_attn_implementation("told")
            # The kernel above sees what Hugging Face's mask lets be seen.
            torch.testing.assert_close(model(tokens).logits, output.logits)
            with tap(modules, visitor, Turn(model.base_model)), pytest.raises(Finished):
                model(tokens)
        for i, weights in enumerate(output.attentions):
            torch.testing.assert_close(values[str(i)], weights)

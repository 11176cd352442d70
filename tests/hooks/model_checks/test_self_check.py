"""What is refused when a model is loaded: modules that are not what the table says, and families without an entry."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from actstore.errors import HookError, ModelError
from actstore.hooks.families import recognition
from actstore.hooks.families.architectures import ARCHITECTURES, Architecture, Attention, Mlp
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
LLAMA = ARCHITECTURES["llama"]
GPT2 = ARCHITECTURES["gpt2"]
assert LLAMA.attention is not None
assert GPT2.attention is not None


@pytest.mark.parametrize(
    ("family", "wrong", "message"),
    [
        (
            "llama",
            replace(LLAMA, attention=replace(LLAMA.attention, value="k_proj")),
            "attn.hook_pattern @ attn.hook_v == attn.hook_z is off",
        ),
        (
            "llama",
            replace(LLAMA, ln2="input_layernorm"),
            "never reached blocks.0.ln1.hook_normalized",
        ),
        (
            "llama",
            replace(LLAMA, mlp=replace(Mlp(), module="post_attention_layernorm")),
            "hook_resid_mid \\+ hook_mlp_out == hook_resid_post is off",
        ),
        (
            "gpt2",
            replace(GPT2, attention=replace(GPT2.attention, fused="heads")),
            "attn.hook_pattern @ attn.hook_v == attn.hook_z is off",
        ),
        ("gemma2", LLAMA, "hook_resid_pre \\+ hook_attn_out == hook_resid_mid is off"),
        ("llama", replace(LLAMA, is_parallel=lambda _config: True), None),
        ("llama", replace(LLAMA, attention=Attention(module="attention")), "has no attribute `attention`"),
    ],
)
def test_a_wrong_entry_is_found(
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    wrong: Architecture,
    message: str | None,
) -> None:
    monkeypatch.setattr(recognition, "ARCHITECTURES", {family: wrong})
    folder = str(tiny_model(family))
    if message is None:
        # The sum is the same; only the name of the middle is missing.
        assert "blocks.0.hook_resid_mid" not in HookedModel.from_pretrained(folder, device="cpu").names
        return
    with pytest.raises(ModelError, match=f"this {family} model (cannot be hooked: .*)?{message}"):
        HookedModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("family", "module", "message"),
    [
        ("llama", "layers.1.self_attn.q_proj", r"in layer 1 ln1.hook_out @ W_Q \+ b_Q == attn.hook_q"),
        ("llama", "layers.1.self_attn.k_proj", r"in layer 1 ln1.hook_out @ W_K \+ b_K == attn.hook_k"),
        ("llama", "layers.1.self_attn.v_proj", r"in layer 1 ln1.hook_out @ W_V \+ b_V == attn.hook_v"),
        ("llama", "layers.1.self_attn.o_proj", r"in layer 1 attn.hook_z @ W_O \+ b_O == output of attention"),
        ("llama", "layers.1.mlp.gate_proj", r"in layer 1 ln2.hook_out @ W_gate \+ b_gate == mlp.hook_pre"),
        ("llama", "layers.1.mlp.up_proj", r"in layer 1 ln2.hook_out @ W_in \+ b_in == mlp.hook_pre_linear"),
        (
            "llama",
            "layers.1.mlp.down_proj",
            r"in layer 1 mlp.hook_post @ W_out \+ b_out == output of the MLP",
        ),
        ("llama", "layers.1.input_layernorm", r"in layer 1 .* ln1.w \+ ln1.b == output of ln1"),
        ("llama", "layers.1.post_attention_layernorm", r"in layer 1 .* ln2.w \+ ln2.b == output of ln2"),
        ("gemma2", "layers.1.post_attention_layernorm", r"in layer 1 .* == output of ln1_post"),
        ("gemma2", "layers.1.post_feedforward_layernorm", r"in layer 1 .* == output of ln2_post"),
        ("llama", "embed_tokens", r"W_E\[tokens\] == hook_embed"),
        ("gpt2", "wpe", r"W_pos\[positions\] == hook_pos_embed"),
        ("llama", "norm", r"ln_final.w \+ ln_final.b == output of ln_final"),
        ("llama", "", r"output of ln_final @ W_U \+ b_U == output of the head"),
        ("gptj", "h.1.mlp.fc_in", r"in layer 1 ln1.hook_out @ W_in \+ b_in == mlp.hook_pre"),
        (
            "gpt_neox",
            "layers.1.attention.query_key_value",
            r"in layer 1 ln1.hook_out @ W_Q \+ b_Q == attn.hook_q",
        ),
    ],
)
def test_a_weight_that_is_not_what_was_used_is_found(
    tiny_model: TinyModel, family: str, module: str, message: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()
    changed = model.base_model.get_submodule(module) if module else model.lm_head
    # As some adapters do it: the module keeps its class and its weight.
    changed.register_forward_hook(lambda _module, _args, output: output * 1.01)
    with pytest.raises(ModelError, match=f"{message}.* is off by") as caught:
        HookedModel(model)
    assert "\n" not in str(caught.value)


def test_a_model_that_gives_no_numbers_is_refused(tiny_model: TinyModel) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="in layer 1 hook_resid_mid .* is off by nan"):
        HookedModel(model.eval())


def small(model_type: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **({"vocab_size": 100} | fields))
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return model


OLMO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def test_a_family_without_an_entry_has_its_residual_stream() -> None:
    model = HookedModel(small("olmo2", **OLMO, pad_token_id=None))
    assert set(model.names) == {"hook_embed"} | {
        f"blocks.{layer}.hook_resid_{end}" for layer in range(3) for end in ("pre", "post")
    }
    tokens = torch.randint(0, 100, (2, 9))
    logits, cache = model.run_with_cache(tokens)
    with torch.no_grad():
        states = model.hf(tokens, output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.equal(cache["resid_pre", layer], states[layer])
    assert torch.equal(logits, model.hf(tokens).logits)
    with pytest.raises(HookError, match="only the residual stream is known for this architecture"):
        model.run_with_cache(tokens, names_filter="blocks.0.attn.hook_z")


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, "see later ones"),
        ("t5", {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8}, "not a causal language model"),
    ],
)
def test_a_family_that_cannot_be_hooked_says_why_and_how_to_add_it(
    model_type: str, fields: dict[str, Any], message: str
) -> None:
    from transformers import AutoModel

    config = AutoConfig.for_model(model_type, **({"vocab_size": 100} | fields))
    with pytest.raises(
        ModelError, match=f"type '{model_type}' cannot be hooked: .*{message}.*how to add one"
    ):
        HookedModel(AutoModel.from_config(config).eval())

"""Hook names: every spelling has its canonical name, and an error explains why nothing matches."""

from typing import Any

import pytest
from transformers import AutoConfig

from actstore.errors import HookError
from actstore.hooks.families.model_names import hooks_of
from actstore.hooks.naming.names import HookNames, layer_of, long_name, split, stored_as


def names_of(model_type: str, **fields: Any) -> HookNames:
    names, _ = hooks_of(AutoConfig.for_model(model_type, num_hidden_layers=3, **fields))
    return names


@pytest.mark.parametrize(
    ("short", "name"),
    [
        # What TransformerLens' get_act_name gives for the same arguments; compared with it below.
        (("resid_post", 5), "blocks.5.hook_resid_post"),
        (("k", 6), "blocks.6.attn.hook_k"),
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("key", 6), "blocks.6.attn.hook_k"),
        (("attn", 4), "blocks.4.attn.hook_pattern"),
        (("attn_logits", 4), "blocks.4.attn.hook_attn_scores"),
        (("mlp_post", 3), "blocks.3.mlp.hook_post"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("pre", 2, "mlp"), "blocks.2.mlp.hook_pre"),
        (("scale", 4, "ln1"), "blocks.4.ln1.hook_scale"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
        (("pre_linear", 1), "blocks.1.mlp.hook_pre_linear"),
        (("embed", None), "hook_embed"),
        (("normalized", None), "ln_final.hook_normalized"),
        ("k6", "blocks.6.attn.hook_k"),
        ("pre5", "blocks.5.mlp.hook_pre"),
        ("scale4ln1", "blocks.4.ln1.hook_scale"),
        ("pattern3", "blocks.3.attn.hook_pattern"),
        ("embed", "hook_embed"),
        ("scale", "ln_final.hook_scale"),
        ("hook_embed", "hook_embed"),
        ("blocks.2.attn.hook_z", "blocks.2.attn.hook_z"),
    ],
)
def test_shorthand(short: Any, name: str) -> None:
    from transformer_lens.utilities import get_act_name

    assert long_name(short) == name
    assert get_act_name(*(short if isinstance(short, tuple) else (short,))) == name


def test_negative_layers_count_from_the_end() -> None:
    assert long_name(("resid_post", -1), 12) == "blocks.11.hook_resid_post"
    with pytest.raises(HookError, match="counts from the end"):
        long_name(("resid_post", -1))


LLAMA = [
    ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post"),
    (("resid_post", -2), "blocks.1.hook_resid_post"),
    ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
    ("blocks.1.hook_in", "blocks.1.hook_resid_pre"),
    ("blocks.1.ln2.hook_in", "blocks.1.hook_resid_mid"),
    ("model.layers.1", "blocks.1.hook_resid_post"),
    ("layers.1", "blocks.1.hook_resid_post"),
    ("blocks.1.attn.hook_out", "blocks.1.hook_attn_out"),
    ("model.layers.1.self_attn", "blocks.1.hook_attn_out"),
    ("blocks.1.mlp.hook_out", "blocks.1.hook_mlp_out"),
    ("model.layers.1.mlp", "blocks.1.hook_mlp_out"),
    ("blocks.1.attn.q.hook_out", "blocks.1.attn.hook_q"),
    ("model.layers.1.self_attn.q_proj", "blocks.1.attn.hook_q"),
    ("blocks.1.attn.o.hook_in", "blocks.1.attn.hook_z"),
    ("blocks.1.mlp.gate.hook_out", "blocks.1.mlp.hook_pre"),
    ("blocks.1.mlp.in.hook_out", "blocks.1.mlp.hook_pre_linear"),
    ("blocks.1.mlp.out.hook_in", "blocks.1.mlp.hook_post"),
    ("model.layers.1.input_layernorm", "blocks.1.ln1.hook_out"),
    ("embed.hook_out", "hook_embed"),
    ("model.embed_tokens", "hook_embed"),
]


@pytest.mark.parametrize(("given", "name"), LLAMA)
def test_every_spelling_means_one_hook(given: Any, name: str) -> None:
    names = names_of("llama")
    assert names.one(given) == name
    assert names.select([given]) == (name,)


def test_spellings_depend_on_the_family() -> None:
    gpt2, gemma2 = names_of("gpt2"), names_of("gemma2")
    assert gpt2.one("transformer.h.2.attn") == "blocks.2.hook_attn_out"
    assert gpt2.one("pos_embed.hook_out") == "hook_pos_embed"
    # Not gated: what goes in is what the activation function gets.
    assert gpt2.one("blocks.0.mlp.in.hook_out") == "blocks.0.mlp.hook_pre"
    # What is added to the stream comes out of the norm behind attention.
    assert gemma2.one("blocks.0.ln1_post.hook_out") == "blocks.0.hook_attn_out"
    assert gemma2.one("model.layers.0.post_attention_layernorm") == "blocks.0.hook_attn_out"
    with pytest.raises(HookError):
        gemma2.one("blocks.0.attn.hook_out")


def test_globs_in_any_spelling_select_in_forward_order() -> None:
    names = names_of("llama")
    posts = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))
    for glob in (
        "blocks.*.hook_resid_post",
        "blocks.*.hook_out",
        "*resid_post",
        "model.layers.?",
        "layers.[012]",
    ):
        assert names.select(glob) == posts, glob
    assert names.select(["blocks.2.hook_attn_out", "blocks.0.hook_mlp_out", ("attn_out", 0)]) == (
        "blocks.0.hook_attn_out",
        "blocks.0.hook_mlp_out",
        "blocks.2.hook_attn_out",
    )
    assert names.select(("blocks.2.hook_attn_out", "k0")) == (
        "blocks.0.attn.hook_k",
        "blocks.2.hook_attn_out",
    )


def test_a_glob_selects_what_is_captured_by_default() -> None:
    names = names_of("llama")
    everything = names.select("*")
    assert "blocks.0.attn.hook_pattern" in everything
    assert "blocks.0.attn.hook_result" not in everything
    assert names.select("blocks.0.attn.hook_result") == ("blocks.0.attn.hook_result",)
    assert names.select("blocks.*.attn.hook_result")[0] == "blocks.0.attn.hook_result"


def test_the_same_tensor_is_stored_once() -> None:
    assert stored_as("blocks.2.hook_resid_pre") == "blocks.1.hook_resid_post"
    assert stored_as("blocks.0.hook_resid_pre") == "blocks.0.hook_resid_pre"
    assert stored_as("hook_embed") == "hook_embed"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param("blocks.1.hook_resid_pots", "nearest names are blocks.1.hook_resid_post", id="misspelt"),
        pytest.param("blocks.1.atn.hook_z", "nearest names are blocks.1.attn.hook_z", id="part misspelt"),
        pytest.param("blocks.7.hook_resid_post", "layers 0 to 2", id="layer too high"),
        pytest.param(("resid_post", 3), "layers 0 to 2", id="layer too high, short"),
        pytest.param(
            "blocks.-1.hook_resid_post", r"counted from the end it is \('resid_post', -1\)", id="negative"
        ),
        pytest.param("blocks.*.hook_nothing", "matches nothing", id="unknown leaf"),
        pytest.param(
            "resid_post",
            r"its name is blocks.0.hook_resid_post, and in all layers blocks.\*.hook_resid_post",
            id="no layer",
        ),
        pytest.param("", "matches nothing", id="empty"),
        pytest.param(
            "hook_pos_embed", "does not exist in this model: positions .* are rotations", id="rotary"
        ),
        pytest.param(("resid_post",), "is not a hook; give a name, or a pair", id="no pair"),
    ],
)
def test_a_name_without_a_match_says_why_or_what_comes_nearest(given: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        names_of("llama").select([given])


@pytest.mark.parametrize(
    ("model_type", "fields", "leaf", "reason"),
    [
        ("gptj", {}, "hook_resid_mid", "in parallel"),
        ("llama", {"num_key_value_heads": 2}, "hook_attn_in", "share keys and values"),
        ("gpt_neox", {}, "hook_resid_mid", "in parallel"),
        ("phi", {}, "ln2.hook_scale", "share one norm"),
        ("gpt2", {}, "attn.hook_rot_q", "does not rotate; attn.hook_q is what it takes"),
        ("opt", {}, "mlp.hook_pre_linear", "not gated"),
        ("mixtral", {}, "mlp.hook_post", "mixture of experts in one fused operation"),
        ("qwen3_moe", {}, "mlp.hook_post", "mixture of experts in one fused operation"),
        ("llama", {}, "mlp.hook_expert_weights", "has no experts"),
    ],
)
def test_a_hook_that_a_family_lacks_is_refused_with_the_reason(
    model_type: str, fields: dict[str, Any], leaf: str, reason: str
) -> None:
    names = names_of(model_type, **fields)
    for pattern in (f"blocks.1.{leaf}", f"blocks.*.{leaf}"):
        with pytest.raises(HookError, match=f"does not exist in this model: .*{reason}"):
            names.select(pattern)
    assert not [name for name in names if name.endswith(f".{leaf}")]


def test_layers_of_one_model_can_differ() -> None:
    names = names_of("qwen2_moe", mlp_only_layers=[1])
    assert names.select("blocks.*.mlp.hook_post") == ("blocks.1.mlp.hook_post",)
    assert names.select("blocks.*.mlp.hook_expert_weights") == (
        "blocks.0.mlp.hook_expert_weights",
        "blocks.2.mlp.hook_expert_weights",
    )


def test_split() -> None:
    assert split("blocks.11.attn.hook_z") == (11, "attn.hook_z")
    assert split("hook_embed") == (None, "hook_embed")
    assert layer_of("blocks.11.hook_resid_post") == 11
    assert layer_of("ln_final.hook_scale") is None

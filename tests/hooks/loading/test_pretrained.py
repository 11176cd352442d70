"""Loading models: what loads, what is missing, and an error of one sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from actstore.errors import ModelError
from actstore.hooks.loading.pretrained import load_config
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import layers_needed

TinyModel = Callable[..., Path]


def test_an_unknown_model_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="'no/such-model' is neither a folder nor a model") as caught:
        load_config("no/such-model")
    assert "\n" not in str(caught.value)


def test_a_path_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        load_config(str(tmp_path / "no-such"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json is a file; give the folder"):
        load_config(str(tmp_path / "config.json"))


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not hold a model"):
        load_config(str(tmp_path))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights that the model needs, such as .*up_proj"):
        HookedModel.from_pretrained(str(tmp_path), device="cpu")


def test_the_dtype_is_that_of_the_checkpoint_unless_told(tiny_model: TinyModel) -> None:
    folder = str(tiny_model("llama"))
    assert HookedModel.from_pretrained(folder, device="cpu").dtype == torch.float32
    assert HookedModel.from_pretrained(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    with pytest.raises(
        ModelError, match="dtype 'int8' is not supported; choose float32, bfloat16 or float16"
    ):
        HookedModel.from_pretrained(folder, dtype="int8", device="cpu")


def test_a_device_that_is_not_there(tiny_model: TinyModel) -> None:
    with pytest.raises(ModelError, match="device 'cuda:99' is not known or not there"):
        HookedModel.from_pretrained(str(tiny_model("llama")), device="cuda:99")


def test_a_model_that_is_loaded_already_can_be_wrapped(tiny_model: TinyModel) -> None:
    folder = tiny_model("gpt2")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = HookedModel(plain)
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens), plain(tokens).logits)
    assert model.cfg.n_layers == 3


def test_sizes_have_the_names_of_transformer_lens(tiny_model: TinyModel) -> None:
    cfg = HookedModel.from_pretrained(str(tiny_model("llama")), device="cpu").cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head) == (3, 64, 4, 2, 16)
    assert (cfg.d_mlp, cfg.d_vocab, cfg.n_ctx, cfg.act_fn) == (128, 300, 128, "silu")
    assert (cfg.normalization_type, cfg.positional_embedding_type) == ("RMS", "rotary")
    assert cfg.gated_mlp
    assert not cfg.parallel_attn_mlp
    cfg = HookedModel.from_pretrained(str(tiny_model("gpt2")), device="cpu").cfg
    assert (cfg.normalization_type, cfg.positional_embedding_type) == ("LN", "standard")
    assert (cfg.n_key_value_heads, cfg.d_mlp, cfg.n_ctx) == (4, 256, 128)
    cfg = HookedModel.from_pretrained(str(tiny_model("gptj")), device="cpu").cfg
    assert cfg.parallel_attn_mlp


def test_a_variant_that_no_entry_describes_is_refused() -> None:
    config = AutoConfig.for_model(
        "opt", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, do_layer_norm_before=False
    )
    with pytest.raises(ModelError, match="norms after attention and MLP"):
        HookedModel(AutoModelForCausalLM.from_config(config).eval())


def test_layers_needed() -> None:
    assert layers_needed(["blocks.0.hook_resid_pre", "blocks.4.hook_mlp_out"], 30) == 5
    assert layers_needed(["hook_embed"], 30) == 1
    assert layers_needed(["blocks.4.hook_mlp_out", "ln_final.hook_scale"], 30) == 30

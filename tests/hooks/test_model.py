"""Hook values against the plain Hugging Face forward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from actstore.errors import HookError, ModelError
from actstore.hooks.model import HookedModel, layers_needed, load_config, resolve_hooks

TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt_neox sequential")
TinyModel = Callable[..., Path]


@pytest.fixture(params=TYPES)
def folder(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Path:
    """A model of each type."""
    model_type, _, sequential = request.param.partition(" ")
    return tiny_model(model_type, use_parallel_residual=False) if sequential else tiny_model(model_type)


def run(folder: Path, patterns: list[str], tokens: Tensor, **options: Any) -> dict[str, Tensor]:
    hooks = resolve_hooks(load_config(str(folder)), patterns)
    model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu", **options)
    values: dict[str, Tensor] = {}
    model.run(tokens, hooks, lambda name, value: values.update({name: value.clone()}))
    assert list(values) == list(hooks)
    return values


def some_tokens(folder: Path, batch: int = 2, length: int = 16) -> Tensor:
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def test_residual_stream_is_bit_equal_to_hidden_states(folder: Path) -> None:
    tokens = some_tokens(folder)
    values = run(folder, ["blocks.*"], tokens)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = plain(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(values["blocks.0.hook_resid_pre"], states[0])
    # The last hidden state that transformers returns has the final norm applied.
    for layer in range(plain.config.num_hidden_layers - 1):
        assert torch.equal(values[f"blocks.{layer}.hook_resid_post"], states[layer + 1])


def test_residual_identities(folder: Path) -> None:
    values = run(folder, ["blocks.*"], some_tokens(folder))
    for layer in range(load_config(str(folder)).num_hidden_layers):
        before = f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"
        attn = values[f"blocks.{layer}.hook_attn_out"]
        mlp = values[f"blocks.{layer}.hook_mlp_out"]
        assert attn.abs().max() > 1e-3
        assert mlp.abs().max() > 1e-3
        torch.testing.assert_close(
            values[before] + attn + mlp, values[f"blocks.{layer}.hook_resid_post"], atol=1e-5, rtol=1e-5
        )
        if f"blocks.{layer}.hook_resid_mid" in values:
            torch.testing.assert_close(
                values[before] + attn, values[f"blocks.{layer}.hook_resid_mid"], atol=1e-5, rtol=1e-5
            )


def test_a_model_loaded_only_as_far_as_needed_gives_the_same_bits(folder: Path) -> None:
    tokens = some_tokens(folder)
    pattern = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"]
    short = run(folder, pattern, tokens, n_layers=2)
    whole = run(folder, pattern, tokens)
    for name, value in whole.items():
        assert torch.equal(short[name], value)


def test_nothing_after_the_last_hook_runs(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")
    ran: list[str] = []
    for name, module in model.base.named_modules():
        module.register_forward_hook(lambda *_args, name=name: ran.append(name))
    model.run(some_tokens(folder), ["blocks.1.hook_attn_out"], lambda *_: None)
    assert "layers.1.self_attn.o_proj" in ran
    assert not [name for name in ran if name.startswith(("layers.1.mlp", "layers.2", "norm"))]


def test_hooks_are_gone_after_an_error_in_the_middle(tiny_model: TinyModel) -> None:
    folder = tiny_model("gpt2")
    model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")

    def fail(_name: str, _value: Tensor) -> None:
        raise RuntimeError("the sink failed")

    with pytest.raises(RuntimeError, match="the sink failed"):
        model.run(some_tokens(folder), ["blocks.1.hook_resid_post"], fail)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.base.modules())


def test_padding_on_the_right_does_not_change_what_comes_before(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    tokens = some_tokens(folder)
    padded = tokens.clone()
    padded[:, 10:] = 0
    hook = "blocks.1.hook_resid_post"
    a, b = run(folder, [hook], tokens)[hook], run(folder, [hook], padded)[hook]
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.equal(a[:, 10:], b[:, 10:])


def test_parallel_blocks_have_no_resid_mid(tiny_model: TinyModel) -> None:
    config = load_config(str(tiny_model("gpt_neox")))
    with pytest.raises(HookError, match="blocks.1.hook_resid_mid.*in parallel"):
        resolve_hooks(config, ["blocks.1.hook_resid_mid"])
    assert not [name for name in resolve_hooks(config, ["blocks.*"]) if "mid" in name]


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


def test_an_unsupported_family_says_which_are_supported(tmp_path: Path) -> None:
    AutoConfig.for_model("bert", hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match="type 'bert' cannot be hooked yet; supported types are gpt2, gpt_neox"
    ):
        resolve_hooks(load_config(str(tmp_path)), ["blocks.*"])


def test_layers_needed() -> None:
    assert layers_needed(["blocks.0.hook_resid_pre", "blocks.4.hook_mlp_out"]) == 5

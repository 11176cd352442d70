"""Models with adapters, quantised modules and offloaded weights: hooks against PyTorch's own, weights against what
each module makes of a unit matrix, or a refusal.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from actstore.errors import ModelError
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
Make = Callable[[Any, Path], Any]
TOKENS: Final = torch.arange(5, 29).view(2, 12)
PROJECTIONS: Final = {
    "W_Q": "self_attn.q_proj",
    "W_K": "self_attn.k_proj",
    "W_V": "self_attn.v_proj",
    "W_O": "self_attn.o_proj",
    "W_gate": "mlp.gate_proj",
    "W_in": "mlp.up_proj",
    "W_out": "mlp.down_proj",
}
HOOKS: Final = {
    "attn.hook_q": "self_attn.q_proj",
    "attn.hook_k": "self_attn.k_proj",
    "attn.hook_v": "self_attn.v_proj",
    "hook_attn_out": "self_attn",
    "ln2.hook_out": "post_attention_layernorm",
    "mlp.hook_pre": "mlp.gate_proj",
    "mlp.hook_pre_linear": "mlp.up_proj",
    "hook_mlp_out": "mlp",
    "hook_resid_post": "",
}
"""The module of a Llama layer whose output a hook shows, by hook."""


def lora(*modules: str, **fields: Any) -> Make:
    """A PeftModel whose adapter is far from nothing."""

    def make(model: Any, _folder: Path) -> Any:
        config = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules=list(modules), init_lora_weights=False, **fields
        )
        return peft.get_peft_model(model, config)

    return make


def inner(make: Make) -> Make:
    return lambda model, folder: make(model, folder).get_base_model()


def merged(model: Any, folder: Path) -> Any:
    made = lora("q_proj", "down_proj")(model, folder)
    made.merge_adapter()
    return made.get_base_model()


def unloaded(model: Any, folder: Path) -> Any:
    return lora("q_proj", "embed_tokens", "lm_head")(model, folder).merge_and_unload()


def added(model: Any, _folder: Path) -> Any:
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    return model


def disabled(model: Any, folder: Path) -> Any:
    made = added(model, folder)
    made.disable_adapters()
    return made


def with_trained_copies(model: Any, folder: Path) -> Any:
    """Whole modules that were trained beside the adapter are used in place of the originals."""
    made = lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])(model, folder).get_base_model()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(2.0)
        made.get_input_embeddings().weight.mul_(3.0)
    return made


def ia3(model: Any, _folder: Path) -> Any:
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    return peft.get_peft_model(model, config)


def norms(model: Any, _folder: Path) -> Any:
    made = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["input_layernorm"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "ln_tuning_layers" in name:
                parameter.mul_(2.0)
    return made


def dynamic_int8(model: Any, _folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to move it to torchao
        quantize: Any = torch.ao.quantization.quantize_dynamic
        return quantize(model, {nn.Linear}, dtype=torch.qint8)


def on_cpu(model: Any, _folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: Any, folder: Path) -> Any:
    parts = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), "cpu")
    parts |= dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm", "lm_head"), "disk")
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


class Doubling(nn.Linear):
    """A module that looks like a linear one, and gives something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(model: Any, _folder: Path) -> Any:
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Doubling
    return model


ALL: Final = frozenset({*PROJECTIONS, "W_E", "W_U"})
MERGE: Final = r"changed by an adapter.*merge_and_unload\(\)"
CASES: Final[dict[str, tuple[Make, frozenset[str], str]]] = {
    "PeftModel": (lora("q_proj", "down_proj"), frozenset({"W_Q", "W_out"}), MERGE),
    "model in a PeftModel": (inner(lora("q_proj", "down_proj")), frozenset({"W_Q", "W_out"}), MERGE),
    "LoRA on every projection": (
        lora(*(path.split(".")[1] for path in PROJECTIONS.values())),
        frozenset(PROJECTIONS),
        MERGE,
    ),
    "DoRA": (lora("o_proj", use_dora=True), frozenset({"W_O"}), MERGE),
    "LoRA on embedding and head": (
        inner(lora("embed_tokens", "lm_head")),
        frozenset({"W_E", "W_U"}),
        MERGE,
    ),
    "add_adapter": (added, frozenset({"W_V"}), MERGE),
    "disabled adapter": (disabled, frozenset(), ""),
    "merged LoRA": (merged, frozenset(), ""),
    "merged and unloaded LoRA": (unloaded, frozenset(), ""),
    "trained copies": (with_trained_copies, frozenset({"W_Q"}), MERGE),
    "IA3": (ia3, frozenset({"W_K", "W_out"}), MERGE),
    "trained norms": (norms, frozenset(), MERGE),
    "dynamic int8": (
        dynamic_int8,
        frozenset({*PROJECTIONS, "W_U"}),
        "does not give the product with its weight.*without quantisation",
    ),
    "CPU offload": (on_cpu, ALL, "offloaded.*onto one device"),
    "disk offload": (on_disk, ALL - {"W_E"}, "offloaded.*onto one device"),
    "a module of another kind": (replaced, frozenset({"W_in"}), "does not give the product with its weight"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path: Path) -> Any:
    """A case: (model, views that it refuses, the message)."""
    make, refused, message = CASES[request.param]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about weights that are tied or not
        model = make(plain, tmp_path).eval().requires_grad_(False)
    return model, refused, message


def layers_of(model: Any) -> Any:
    base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return base.model.layers


def test_hooks_are_what_passes_and_weights_are_what_is_used(case: tuple[Any, frozenset[str], str]) -> None:
    model, refused, message = case
    passed: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            passed[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        layer.get_submodule(path).register_forward_hook(keep(f"blocks.{index}.{leaf}"))
        for index, layer in enumerate(layers_of(model))
        for leaf, path in HOOKS.items()
    ]
    plain = model(input_ids=TOKENS, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    hooked = HookedModel(model)
    logits, cache = hooked.run_with_cache(TOKENS)
    assert torch.equal(logits, plain.logits)
    assert torch.equal(cache["hook_embed"], plain.hidden_states[0])
    for name, value in passed.items():
        assert torch.equal(cache[name].flatten(2), value.flatten(2)), name
    for view in sorted(ALL):
        if view in refused:
            with pytest.raises(ModelError, match=message) as caught:
                getattr(hooked, view)
            assert "\n" not in str(caught.value)
        else:
            check_view(hooked, view, layers_of(model))
    if any("ln_tuning" in name for name, _ in model.named_parameters()):
        with pytest.raises(ModelError, match=MERGE):
            _ = hooked.blocks[1].ln1.w
    if "W_O" in refused:
        with pytest.raises(ModelError, match=message):
            hooked.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_result")


def check_view(hooked: HookedModel, view: str, layers: Any) -> None:
    """Compare a weight with what the module itself makes of unit vectors, or of every id."""
    if view == "W_E":
        ids = torch.arange(hooked.cfg.d_vocab)
        assert torch.equal(hooked.W_E, hooked.hf.get_input_embeddings()(ids))
        return
    if view == "W_U":
        expected = hooked.hf.get_output_embeddings()(torch.eye(hooked.cfg.d_model))
        assert torch.allclose(hooked.W_U, expected, atol=1e-6)
        return
    for index, layer in enumerate(layers):
        module = layer.get_submodule(PROJECTIONS[view])
        weight = getattr(
            hooked.blocks[index].attn if view in "W_Q W_K W_V W_O" else hooked.blocks[index].mlp, view
        )
        unit = torch.eye(module.in_features)
        expected = module(unit) - module(torch.zeros_like(unit))
        if view in ("W_K", "W_V"):  # once for every query head
            expected = expected.view(len(unit), -1, 16).repeat_interleave(2, dim=1).flatten(1)
        if view in ("W_Q", "W_K", "W_V"):
            weight = weight.transpose(0, 1)
        assert torch.allclose(weight.reshape(expected.shape), expected, atol=1e-5), (view, index)


def test_gpt2s_turned_weights_in_an_adapter(tiny_model: TinyModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"), dtype=torch.float32).eval()
    before = HookedModel(plain).blocks[1].mlp.W_in.clone()
    config = peft.LoraConfig(target_modules=["c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for what it has renamed
        hooked = HookedModel(peft.get_peft_model(plain, config).eval())
    with pytest.raises(ModelError, match=MERGE):
        _ = hooked.W_in
    with hooked.hf.disable_adapter():
        assert torch.equal(hooked.blocks[1].mlp.W_in, before)
    hooked.hf.merge_adapter()
    assert not torch.allclose(hooked.blocks[1].mlp.W_in, before, atol=1e-2)


def test_an_adapter_that_is_added_after_wrapping_counts(tiny_model: TinyModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    hooked = HookedModel(plain)
    assert hooked.W_U.shape == (64, 300)
    plain.add_adapter(peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    plain.eval()
    for view in ("W_U", "W_Q"):
        with pytest.raises(ModelError, match=MERGE):
            getattr(hooked, view)
    logits = hooked(TOKENS)
    assert torch.equal(logits, plain(TOKENS).logits)

"""Hooks, weights and modules as attributes of a model, under TransformerLens' names."""

from typing import Any

import pytest
import torch
from torch import Tensor

from actstore.demo import MODEL_PATH
from actstore.errors import ModelError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.hooks.test_model import TinyModel, load
from tests.parity.bridge import boot
from tests.parity.families import FAMILIES

TOKENS = torch.randint(2, 300, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_is_an_attribute(tiny_model: TinyModel, family: str) -> None:
    model = load(tiny_model(family))
    for name, point in model.hook_dict.items():
        assert attribute(model, name) is point
        assert point.name == name


def attribute(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def test_a_bridge_has_the_same_attributes() -> None:
    """What notebooks read from a model gives the same here and there."""
    ours, theirs = HookedModel.from_pretrained(MODEL_PATH), boot(MODEL_PATH)
    stream = torch.randn(1, 5, ours.cfg.d_model, generator=torch.Generator().manual_seed(1))
    for path in (
        *("W_E", "embed.W_E", "pos_embed.W_pos", "unembed.W_U", "unembed.b_U", "ln_final.w", "ln_final.b"),
        *(f"blocks.1.attn.{kind}_{one}" for kind in "Wb" for one in "QKVO"),
        *(f"blocks.1.mlp.{kind}_{one}" for kind in "Wb" for one in ("in", "out")),
        *(f"blocks.1.{norm}.{one}" for norm in ("ln1", "ln2") for one in "wb"),
    ):
        torch.testing.assert_close(attribute(ours, path), attribute(theirs, path).detach(), msg=path)
    for path in ("ln_final", "unembed", "blocks.1.ln1", "blocks.2.ln2", "blocks.0.mlp"):
        torch.testing.assert_close(attribute(ours, path)(stream), attribute(theirs, path)(stream).detach())
    tokens = ours.to_tokens("My lord")
    assert torch.equal(ours.embed(tokens), ours.run_with_cache(tokens)[1]["hook_embed"])
    for path in (
        "hook_embed",
        "blocks.1.hook_resid_pre",
        "blocks.1.attn.hook_pattern",
        "blocks.3.ln1.hook_scale",
    ):
        assert isinstance(attribute(ours, path), HookPoint)
        assert hasattr(attribute(theirs, path), "add_hook")


def test_a_logit_lens_by_hand(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.equal(model.unembed(model.ln_final(cache["resid_post", -1])), logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi", "gemma", "opt"])
def test_a_forward_by_hand(tiny_model: TinyModel, family: str) -> None:
    """Part by part, as exercises write it, with a function on a hook of one layer."""
    model = load(tiny_model(family))

    def half(value: Tensor, hook: HookPoint) -> Tensor:
        return value / 2

    model.blocks[1].attn.hook_z.add_hook(half)
    expected, cache = model.run_with_cache(TOKENS)
    stream = cache["resid_pre", 0]
    if family in ("gpt2", "opt"):
        torch.testing.assert_close(model.embed(TOKENS) + model.pos_embed(TOKENS), stream)
    for block in model.blocks:
        stream = block(stream)
    torch.testing.assert_close(model.unembed(model.ln_final(stream)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_embeddings_of_positions(tiny_model: TinyModel, family: str) -> None:
    """Those that a forward has, after padding and after earlier positions; 0 at padding, as in TransformerLens."""
    model = load(tiny_model(family))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    found = model.pos_embed(TOKENS, 0, attention_mask=mask)
    _, cache = model.run_with_cache(TOKENS, attention_mask=mask, names_filter="hook_pos_embed")
    real = mask.bool()
    assert torch.equal(found[real], cache["pos_embed"][real])
    assert not found[~real].any()
    later = model.pos_embed(TOKENS[:, 4:], 4, mask)
    assert torch.equal(later, found[:, 4:])
    assert torch.equal(model.pos_embed(TOKENS[:, 4:], past_kv_pos_offset=4)[1], model.W_pos[4:6])


def test_a_layer_takes_the_options_of_a_call(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    _, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    found = model.blocks[1](cache["resid_pre", 1], attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], cache["resid_post", 1][mask.bool()])
    assert model.blocks[1](cache["resid_pre", 1], grad=True).shape == (2, 6, 64)


def test_functions_on_attributes(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))
    plain = model(TOKENS)
    seen: list[tuple[str, Any]] = []

    def twice(value: Tensor, hook: HookPoint) -> Tensor:
        hook.ctx["norm"] = value.norm()
        seen.append((hook.name, hook))
        return value * 2

    point = model.blocks[1].attn.hook_z
    point.add_hook(twice)
    edited = model(TOKENS)
    assert not torch.equal(edited, plain)
    assert seen == [("blocks.1.attn.hook_z", point)]
    assert set(model.hook_dict["blocks.1.attn.hook_z"].ctx) == {"norm"}
    assert repr(point) == "HookPoint(name='blocks.1.attn.hook_z', 1 fwd)"
    point.remove_hooks()
    assert torch.equal(model(TOKENS), plain)
    assert point.ctx
    assert not point.has_hooks()


def test_what_is_not_there(tiny_model: TinyModel) -> None:
    llama, phi = load(tiny_model("llama")), load(tiny_model("phi"))
    assert not hasattr(llama, "hook_pos_embed")
    assert not hasattr(llama, "pos_embed")
    with pytest.raises(AttributeError, match="it has hook_q, hook_k"):
        _ = llama.blocks[0].attn.W_X
    with pytest.raises(AttributeError, match="layers 0 to|nearest names are blocks.0.attn.hook_q"):
        _ = llama.blocks[0].attn.hook_qq
    with pytest.raises(AttributeError, match=r"write into the tensor \(model.blocks.0.mlp.W_in\[:\] = ...\)"):
        llama.blocks[0].mlp.W_in = torch.zeros(1)
    with pytest.raises(TypeError, match=r"blocks.0.attn cannot be called"):
        llama.blocks[0].attn(TOKENS)
    with pytest.raises(ModelError, match="share one norm, ln1"):
        _ = phi.blocks[0].ln2


def test_completion_shows_what_there_is(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gpt2"))
    assert {"W_Q", "hook_embed", "blocks", "ln_final", "unembed", "to_tokens", "OV"} <= set(dir(model))
    for name in set(dir(model)) - {"folded_W_U", "W_gate", "b_gate"}:  # which say why there is none
        assert hasattr(model, name), name
    assert {"hook_z", "W_O", "b_O", "QK"} <= set(dir(model.blocks[0].attn))
    assert repr(model.ln_final) == "<ln_final: hook_scale, hook_normalized, w, b>"
    assert "hook_resid_mid" in repr(model.blocks[0])

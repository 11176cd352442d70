"""An edit of any hook gives the logits of a Hugging Face model with the same edit, made without actstore."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.hooks.capture.hf_edits import FAMILIES, Family

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))
LAYERS = {"hook_resid_pre": 0, "hook_resid_post": 2}
"""The hooks at both ends of the model, and all others in the middle layer."""


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_hugging_face_with_the_same_edit(tiny_model: TinyModel, name: str) -> None:
    """Compare edits in place, or returned in another dtype, with a plain model that runs the plain kernel."""
    family, folder = FAMILIES[name], str(tiny_model(name))
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    hooks = _named(family)
    _, cache = model.run_with_cache(TOKENS, names_filter=[*model.names])
    # No hook of the layer in the middle is left out.
    there = {hook for hook in model.names if hook.startswith("blocks.1.") and "expert" not in hook}
    assert {hook for hook in hooks if hook.startswith("blocks.1.")} >= there - {
        f"blocks.1.{leaf}" for leaf in LAYERS
    }
    for hook, (root, add) in hooks.items():
        value = cache[hook]
        # Not a multiple of the value, which norms would take out again.
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).half().float()
        noise *= 2.0 ** value[value.isfinite()].abs().mean().log2().round()
        if hook.endswith("hook_scale"):
            noise = noise.abs()  # next to 0, a scale blows rounding up

        def in_place(value: Tensor, hook: HookPoint, noise: Tensor = noise) -> None:
            value.add_(noise)

        def returned(value: Tensor, hook: HookPoint, noise: Tensor = noise) -> Tensor:
            return value.double() + noise

        with torch.no_grad(), add(plain.base_model.get_submodule(root), noise):
            expected = plain(TOKENS, use_cache=False).logits
        for function in (in_place, returned):
            logits = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, function)])
            say = partial("{} {}: {}".format, hook, function.__name__)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4, msg=say)
    assert (expected - plain(TOKENS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("hook", ["blocks.1.ln1.hook_scale", "blocks.1.ln2.hook_normalized"])
def test_an_edit_of_a_norm_in_bfloat16_rounds_no_other_position(
    tiny_model: TinyModel, name: str, hook: str
) -> None:
    """Positions before the edit keep the bits of the plain model; the edited one has what the norm makes of it."""
    folder = str(tiny_model(name))
    model = HookedModel.from_pretrained(folder, dtype="bfloat16", device="cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = plain(TOKENS, use_cache=False).logits
    out = hook.replace("hook_scale", "hook_out").replace("hook_normalized", "hook_out")
    _, before = model.run_with_cache(TOKENS, names_filter=[hook, out])
    factor = (
        0.5 if hook.endswith("scale") else 2.0
    )  # both make what the norm gives twice as large, without its bias

    def edit(value: Tensor, hook: HookPoint) -> None:
        value[:, 4] *= factor

    with model.hooks([(hook, edit)]), torch.no_grad():
        logits, after = model.run_with_cache(TOKENS, names_filter=[hook, out])
    assert torch.equal(logits[:, :4], expected[:, :4])
    assert not torch.equal(logits[:, 4], expected[:, 4])
    others = [position for position in range(10) if position != 4]
    assert torch.equal(after[out][:, others], before[out][:, others])
    module = model.base.get_submodule(f"{FAMILIES[name].layers}.1")
    bias = 0.0
    if name in ("gpt2", "gpt_neox"):
        which = {"ln1": ("ln_1", "input_layernorm"), "ln2": ("ln_2", "post_attention_layernorm")}
        (norm,) = (getattr(module, part) for part in which[hook.split(".")[2]] if hasattr(module, part))
        bias = norm.bias.float()
    twice = 2 * (before[out][:, 4].float() - bias) + bias
    torch.testing.assert_close(after[out][:, 4].float(), twice, atol=0.02, rtol=2**-7)


def _named(family: Family) -> dict[str, tuple[str, Any]]:
    """(module that the edit is below, edit) by hook."""
    edits = {hook: ("", add) for hook, add in family.outside.items()}
    for leaf, add in family.in_layer.items():
        layer = LAYERS.get(leaf, 1)
        edits[f"blocks.{layer}.{leaf}"] = (f"{family.layers}.{layer}", add)
    return edits

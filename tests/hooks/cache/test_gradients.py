"""Caches of gradients: the gradients in them are right, and no other values are computed from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actstore.errors import HookError, ModelError
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (1, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gpt2(tiny_model: TinyModel) -> HookedModel:
    return HookedModel.from_pretrained(str(tiny_model("gpt2")), dtype="float32", device="cpu")


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 7] - logits[0, -1, 9]


def gradients_of(model: HookedModel, names_filter: Any = None) -> ActivationCache:
    logits, cache = model.run_with_cache(TOKENS, names_filter=names_filter, grad=True)
    return cache.gradients(metric(logits))


def by_hand(model: HookedModel, names_filter: Any = None) -> ActivationCache:
    """A cache of gradients, made as TransformerLens' users do."""
    logits, cache = model.run_with_cache(TOKENS, names_filter=names_filter, grad=True)
    gradients = torch.autograd.grad(metric(logits), list(cache.values()))
    return ActivationCache(dict(zip(cache, gradients, strict=True)), model)


def test_they_are_the_gradients_of_each_hook(gpt2: HookedModel) -> None:
    cache, other = gradients_of(gpt2), by_hand(gpt2)
    assert list(cache) == list(other) == list(gpt2.names.select("*"))
    assert all(torch.equal(value, other[name]) for name, value in cache.items())
    assert cache.kind == "gradients"
    assert other.kind is None
    assert cache["resid_mid", 1].shape == (1, 8, 64)
    # What only sums up or chooses what is held is right of gradients too.
    assert torch.equal(cache.decompose_resid()[2], cache["attn_out", 0])
    assert torch.equal(cache.accumulated_resid(incl_mid=True)[1], cache["resid_mid", 0])
    assert torch.equal(cache.stack_activation("z")[1], cache["z", 1])
    assert cache.apply_slice_to_batch_dim([0]).kind == cache.remove_batch_dim().kind == "gradients"


@pytest.mark.parametrize("make", [gradients_of, by_hand])
def test_nothing_is_derived_from_gradients(gpt2: HookedModel, make: Callable[..., ActivationCache]) -> None:
    cache = make(gpt2)
    part = make(
        gpt2, ["blocks.*.hook_resid_pre", "*attn_out", "*attn.hook_z", "*attn_scores", "*mlp.hook_pre"]
    )
    stack = cache.decompose_resid()
    calls: dict[str, Callable[[], object]] = {
        "blocks.1.attn.hook_result": lambda: part["result", 1],
        "blocks.1.hook_resid_mid": lambda: part["resid_mid", 1],
        "blocks.1.ln1.hook_scale": lambda: part["scale", 1, "ln1"],
        "blocks.1.ln1.hook_normalized": lambda: part["normalized", 1, "ln1"],
        "blocks.1.attn.hook_pattern": lambda: part["pattern", 1],
        "blocks.1.mlp.hook_post": lambda: part["post", 1],
        "blocks.1.hook_mlp_in": lambda: cache["blocks.1.hook_mlp_in"],
        "stack_head_results": cache.stack_head_results,
        "stack_head_results with incl_remainder": lambda: cache.stack_head_results(incl_remainder=True),
        "stack_neuron_results": lambda: cache.stack_neuron_results(2),
        "get_neuron_results": lambda: cache.get_neuron_results(1),
        "get_full_resid_decomposition": cache.get_full_resid_decomposition,
        "apply_ln_to_stack": lambda: cache.apply_ln_to_stack(stack),
        "decompose_resid": lambda: cache.decompose_resid(apply_ln=True),
        "accumulated_resid": lambda: cache.accumulated_resid(apply_ln=True),
        "logit_attrs": lambda: cache.logit_attrs(stack, 5),
        "logit_lens": cache.logit_lens,
    }
    reason = "this cache holds gradients" if make is gradients_of else "was made by hand, maybe of gradients"
    for what, call in calls.items():
        with pytest.raises(HookError) as caught:
            call()
        text = str(caught.value)
        assert reason in text, what
        assert "\n" not in text, what
        if what.startswith("blocks"):
            assert f"does not hold {what}" in text
            assert f"add {what} to names_filter" in text
    with pytest.raises(HookError, match=r"stack_head_results: .* does not hold blocks.0.attn.hook_result"):
        cache.stack_head_results()


def test_gradients_of_heads_are_those_of_a_finite_difference(gpt2: HookedModel) -> None:
    """A filter that says yes to every hook keeps every hook, and so the output of each head."""
    cache = gradients_of(gpt2, lambda _name: True)
    assert "blocks.0.attn.hook_result" in cache
    assert "blocks.0.hook_mlp_in" in cache
    heads = cache.stack_head_results(-1)  # [layer and head, batch, position, d_model]
    step = 1e-2
    for layer, head in ((0, 1), (2, 3)):
        direction = torch.randn(8, 64, generator=torch.Generator().manual_seed(head))

        def moved(sign: int, layer: int = layer, head: int = head, direction: Tensor = direction) -> Tensor:
            def move(value: Tensor, hook: HookPoint) -> None:
                value[:, :, head] += sign * step * direction

            return metric(gpt2.run_with_hooks(TOKENS, fwd_hooks=[(("result", layer), move)])).double()

        expected = (moved(1) - moved(-1)) / (2 * step)
        attribution = (heads[layer * 4 + head, 0] * direction).sum()
        assert float(attribution) == pytest.approx(float(expected), rel=0.02, abs=1e-3)


def test_the_stream_between_two_layers_has_one_gradient(gpt2: HookedModel) -> None:
    whole = gradients_of(gpt2)
    cache = gradients_of(gpt2, "blocks.*.hook_resid_post")
    assert torch.equal(cache["resid_pre", 2], cache["resid_post", 1])
    torch.testing.assert_close(cache["resid_pre", 2], whole["resid_pre", 2])
    with gpt2.hooks([(("resid_pre", 2), lambda value, hook: value * 2)]):
        edited = gradients_of(gpt2, "blocks.*.hook_resid_post")
    with pytest.raises(HookError, match="does not hold blocks.2.hook_resid_pre"):
        edited["resid_pre", 2]


def test_a_cache_made_by_hand_computes_if_told_what_it_holds(gpt2: HookedModel) -> None:
    _, cache = gpt2.run_with_cache(TOKENS)
    values = {f"blocks.{layer}.attn.hook_z": cache["z", layer] for layer in range(3)}
    labelled = ActivationCache(values, gpt2, kind="activations")
    torch.testing.assert_close(labelled.stack_head_results(), cache.stack_head_results())
    wrong: Any = "gradient"
    with pytest.raises(HookError, match="kind is 'gradient'; choose"):
        ActivationCache(values, gpt2, kind=wrong)
    with pytest.raises(ModelError, match="needs the model of its values"):
        ActivationCache(values)


def test_what_has_no_gradient_is_said(gpt2: HookedModel) -> None:
    logits, cache = gpt2.run_with_cache(TOKENS, names_filter=["blocks.*.hook_resid_post", "z1"], grad=True)
    early = cache["resid_post", 0].square().sum()
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: cache.gradients(logits), "expected a tensor of one number"),
        (lambda: cache.gradients(metric(logits.detach())), "expected a tensor of one number"),
        (lambda: cache.gradients(3.0), "expected a tensor of one number"),  # type: ignore[arg-type]
        (lambda: cache.gradients(early), r"was not computed from blocks.1.*; leave it out of names_filter"),
        (lambda: cache.gradients(early, "blocks.0.attn.hook_z"), "does not hold blocks.0.attn.hook_z"),
        (lambda: gpt2.run_with_cache(TOKENS)[1].gradients(early), "run with grad=True"),
        (
            lambda: cache.apply_slice_to_batch_dim(0).gradients(metric(logits)),
            "choose rows or positions after",
        ),
        (lambda: cache.gradients(early, ("resid_post", 0)).gradients(early), "this cache holds gradients"),
        (
            lambda: gpt2.run_with_cache(TOKENS, grad=True, remove_batch_dim=True),
            "leave out pos_slice, device and remove_batch_dim, or incl_bwd",
        ),
    ]
    for call, message in refused:
        with pytest.raises(HookError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    torch.testing.assert_close(
        cache.gradients(early, ("resid_post", 0))["resid_post", 0], 2 * cache["resid_post", 0].detach()
    )
    number = metric(logits)
    torch.autograd.backward(number)
    with pytest.raises(HookError, match="the graph of this run has been freed"):
        cache.gradients(number)

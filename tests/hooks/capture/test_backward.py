"""Functions for gradients: they see what TransformerLens' see, and what they return goes further back."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore.errors import HookError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.parity.bridge import boot

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))
LEAVES = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z"),
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "mlp.hook_pre", "mlp.hook_post"),
    *("ln1.hook_normalized", "ln2.hook_scale"),
)
NAMES = [f"blocks.{layer}.{leaf}" for layer in range(3) for leaf in LEAVES] + ["ln_final.hook_normalized"]


def load(folder: Path) -> HookedModel:
    return HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def gpt2(tiny_model: TinyModel) -> HookedModel:
    return load(tiny_model("gpt2"))


def metric(logits: Tensor) -> Tensor:
    number: Tensor = logits[0, -1, 5] - logits[1, 4, 6].square()
    return number


def backward_of(model: Any, names: list[str], **options: Any) -> dict[str, Tensor]:
    """The gradients that functions on hooks see."""
    gradients: dict[str, Tensor] = {}

    def see(gradient: Tensor, hook: Any) -> None:
        gradients[hook.name] = gradient.detach().clone()

    with model.hooks(bwd_hooks=[(name, see) for name in names], **options):
        metric(model(TOKENS)).backward()  # type: ignore[no-untyped-call]
    return gradients


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_gradients_are_those_of_transformerlens_and_of_hugging_face(
    tiny_model: TinyModel, family: str
) -> None:
    folder = tiny_model(family)
    model, bridge = load(folder), boot(folder)
    names = [name for name in NAMES if name in model.names]
    ours = backward_of(model, names)
    assert ours.keys() == set(names)
    for name, gradient in _of_bridge(bridge, names).items():
        if name.endswith("resid_mid"):
            # The Bridge's is the part that goes through the MLP. The stream between is a sum with attn_out in it.
            gradient = ours[name.replace("resid_mid", "attn_out")]
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-4, rtol=1e-3, msg=partial("{} {}".format, name)
        )
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    layer = plain.get_submodule(next(path for path, it in model.hf.named_modules() if it is model.layers[1]))
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(
        lambda _module, _args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    number = metric(plain(TOKENS).logits)
    handle.remove()
    torch.testing.assert_close(ours["blocks.1.hook_resid_post"], torch.autograd.grad(number, outputs)[0])


def _of_bridge(bridge: Any, names: list[str]) -> dict[str, Tensor]:
    """The gradients of the Bridge, under our names; it gives its own names to functions."""
    gradients: dict[str, Tensor] = {}
    for name in names:
        if name not in bridge.hook_dict:  # another name there
            continue

        def see(value: Tensor, hook: Any, name: str = name) -> None:
            gradients[name] = value.clone()

        with bridge.hooks(bwd_hooks=[(name, see)]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric(bridge(TOKENS)).backward()  # type: ignore[no-untyped-call]
    assert len(gradients) > 20
    return gradients


@pytest.mark.parametrize("returns", [True, False], ids=["returned", "in place"])
def test_what_is_returned_goes_further_back(tiny_model: TinyModel, gpt2: HookedModel, returns: bool) -> None:
    """In place of the gradient, past functions of the forward on the same hook; the last one decides."""
    bridge = boot(tiny_model("gpt2"))
    name, earlier = "blocks.1.hook_mlp_out", "blocks.0.hook_resid_post"

    def halved(gradient: Tensor, hook: Any) -> Tensor | None:
        if returns:
            return gradient / 2
        gradient.div_(2)
        return None

    def through(model: Any, *functions: Any, forward: Any = ()) -> Tensor:
        seen: list[Tensor] = []
        hooks = [(name, function) for function in functions]
        with model.hooks(
            fwd_hooks=forward, bwd_hooks=[*hooks, (earlier, lambda g, hook: seen.append(g.clone()))]
        ):
            metric(model(TOKENS)).backward()  # type: ignore[no-untyped-call]
        return seen[0]

    plain = through(gpt2)
    once = through(gpt2, halved)
    assert not torch.allclose(once, plain)
    if returns:
        torch.testing.assert_close(through(bridge, halved), once, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            through(bridge, halved, halved), through(gpt2, halved, halved), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(through(gpt2, lambda g, hook: (g / 2,)), once)
        tripled: Any = [(name, lambda value, hook: value * 3)]
        torch.testing.assert_close(
            through(bridge, halved, forward=tripled),
            through(gpt2, halved, forward=tripled),
            atol=1e-5,
            rtol=1e-4,
        )
    # The gradient of the sum of two paths, with one of them halved.
    without = through(gpt2, lambda g, hook: torch.zeros_like(g))
    torch.testing.assert_close(once, (plain + without) / 2, atol=1e-5, rtol=1e-4)


def test_functions_that_stay_and_run_backward_later(gpt2: HookedModel) -> None:
    seen: list[str] = []
    expected = gpt2(TOKENS)
    assert not expected.requires_grad
    gpt2.add_hook("blocks.*.hook_resid_pre", lambda gradient, hook: seen.append(hook.name), dir="bwd")
    try:
        with pytest.raises(HookError, match="a direct call of the Hugging Face model"):
            gpt2.hf(TOKENS)
        with torch.no_grad():
            assert not gpt2(TOKENS).requires_grad
        logits = gpt2(TOKENS)
        torch.testing.assert_close(logits, expected)
        assert seen == []
    finally:
        gpt2.reset_hooks()
    metric(logits).backward()  # type: ignore[no-untyped-call]
    assert seen == [f"blocks.{layer}.hook_resid_pre" for layer in (2, 1, 0)]
    gpt2.hf(TOKENS)
    assert not gpt2(TOKENS).requires_grad


def test_a_value_from_elsewhere_has_a_gradient_too(gpt2: HookedModel) -> None:
    """Attribution puts other embeddings in place, and asks for the gradient there."""
    _, other = gpt2.run_with_cache(TOKENS.flip(0), names_filter=["hook_embed", ("resid_pre", 1)])
    gradients: list[Tensor] = []
    for name in other:
        with gpt2.hooks(
            fwd_hooks=[(name, lambda value, hook: other[hook.name])],
            bwd_hooks=[(name, lambda gradient, hook: gradients.append(gradient))],
        ):
            metric(gpt2(TOKENS)).backward()  # type: ignore[no-untyped-call]
            logits, cache = gpt2.run_with_cache(TOKENS, names_filter=name, grad=True)
            expected = cache.gradients(metric(logits))[name]
        torch.testing.assert_close(gradients.pop(0), expected)
        gradients.clear()


def test_what_is_refused(gpt2: HookedModel, tiny_model: TinyModel) -> None:
    mixtral = load(tiny_model("mixtral"))
    looks: Any = lambda gradient, hook: None  # noqa: E731
    with pytest.raises(HookError, match="has no gradient: it can be read but not changed"):
        mixtral.add_hook("blocks.0.mlp.hook_expert_weights", looks, dir="bwd")
    with pytest.raises(HookError, match="dir is 'back'; choose 'fwd' for values or 'bwd'"):
        gpt2.add_hook("blocks.0.hook_resid_pre", looks, dir="back")  # type: ignore[arg-type]
    with gpt2.hooks(bwd_hooks=[("hook_embed", lambda g, hook: g[:1])]):
        number = metric(gpt2(TOKENS))
    with pytest.raises(HookError, match="the function on hook_embed gave shape"):
        number.backward()  # type: ignore[no-untyped-call]
    assert all(not module._forward_hooks for module in gpt2.hf.modules())


def test_every_hook_with_functions_that_do_nothing(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))
    expected = model.run_with_cache(TOKENS, grad=True)
    names = [name for name in model.names.select("*") if name in expected[1]]
    gradients = expected[1].gradients(metric(expected[0]))
    seen: dict[str, Tensor] = {}

    def see(gradient: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = gradient

    with model.hooks([("*", lambda value, hook: None)], [("*", see)]):
        metric(model(TOKENS)).backward()  # type: ignore[no-untyped-call]
    assert seen.keys() == set(names)
    for name in names:
        torch.testing.assert_close(seen[name], gradients[name], atol=1e-5, rtol=1e-4)

"""Copies of the stream for each head: the input of one head can be edited alone, as path patching does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actstore.errors import HookError
from actstore.hooks.model import HookedModel
from tests.parity.bridge import boot

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> HookedModel:
    return HookedModel.from_pretrained(str(tiny_model("llama")), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def gpt2(tiny_model: TinyModel) -> HookedModel:
    return HookedModel.from_pretrained(str(tiny_model("gpt2")), dtype="float32", device="cpu")


def test_an_edit_changes_the_queries_of_one_head_and_nothing_else_before_attention(
    llama: HookedModel,
) -> None:
    _, plain = llama.run_with_cache(TOKENS)
    _, other = llama.run_with_cache(TOKENS.flip(0))

    def swap(value: Tensor, hook: Any) -> None:
        assert value.shape == (2, 10, 4 if "q_" in hook.name else 2, 64)
        assert torch.equal(value, plain["resid_pre", 1][:, :, None].expand_as(value))
        value[:, :, 1] = other["resid_pre", 1]

    for letter in "qkv":
        with llama.hooks([((f"{letter}_input", 1), swap)]):
            logits, cache = llama.run_with_cache(TOKENS)
        expected = plain[letter, 1].clone()
        expected[:, :, 1] = other[letter, 1][:, :, 1]
        torch.testing.assert_close(cache[letter, 1], expected, atol=1e-4, rtol=1e-4)
        for same in {*"qkv"} - {letter}:
            assert torch.equal(cache[same, 1], plain[same, 1])
        unchanged = [head for head in range(expected.shape[2]) if head != 1]
        assert torch.equal(cache[letter, 1][:, :, unchanged], plain[letter, 1][:, :, unchanged])
        for name in ("blocks.1.hook_resid_pre", "blocks.1.ln1.hook_out", "blocks.0.hook_resid_post"):
            assert torch.equal(cache[name], plain[name])
        assert not torch.equal(logits, llama(TOKENS))


def test_the_same_edit_in_transformerlens(tiny_model: TinyModel, gpt2: HookedModel) -> None:
    bridge: Any = boot(tiny_model("gpt2"))
    noise = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(2))

    def add(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 2] += noise
        return value

    bridge.set_use_split_qkv_input(True)
    for leaf in ("hook_q_input", "hook_k_input", "hook_v_input"):
        hooks = [(f"blocks.1.{leaf}", add)]
        torch.testing.assert_close(
            gpt2.run_with_hooks(TOKENS, fwd_hooks=hooks),
            bridge.run_with_hooks(TOKENS, fwd_hooks=hooks),
            atol=1e-4,
            rtol=1e-4,
        )
    bridge.set_use_split_qkv_input(False)
    bridge.set_use_attn_in(True)
    hooks = [("blocks.1.hook_attn_in", add)]
    torch.testing.assert_close(
        gpt2.run_with_hooks(TOKENS, fwd_hooks=hooks),
        bridge.run_with_hooks(TOKENS, fwd_hooks=hooks),
        atol=1e-4,
        rtol=1e-4,
    )


def test_gradients_of_heads_add_up_to_that_of_the_stream(gpt2: HookedModel) -> None:
    """The stream goes into queries, keys and values of each head, and past attention."""
    names = [
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_attn_out",
        *(f"blocks.1.hook_{letter}_input" for letter in "qkv"),
    ]
    logits, cache = gpt2.run_with_cache(TOKENS, names_filter=names, grad=True)
    torch.testing.assert_close(logits, gpt2(TOKENS), atol=1e-4, rtol=1e-4)
    gradients = cache.gradients(logits[0, -1, 3])
    heads = sum(gradients[f"{letter}_input", 1].sum(2) for letter in "qkv")
    past = gradients["attn_out", 1]  # the stream after attention is this sum
    torch.testing.assert_close(gradients["resid_pre", 1], heads + past, atol=1e-5, rtol=1e-4)
    seen: list[Tensor] = []
    with gpt2.hooks(bwd_hooks=[(("attn_in", 1), lambda gradient, hook: seen.append(gradient))]):
        gpt2(TOKENS)[0, -1, 3].backward()
    torch.testing.assert_close(seen[0].sum(2), heads, atol=1e-5, rtol=1e-4)


def test_copies_are_there_only_for_who_names_them(gpt2: HookedModel) -> None:
    copies = {name for name in gpt2.names if name.endswith(("_input", "attn_in"))}
    assert len(copies) == 12
    for everything in (
        None,
        "*",
        lambda name: True,
        lambda name: "blocks.1" in name,
        lambda name: "_q" in name,
    ):
        for grad in (False, True):
            if everything is None or grad or callable(everything):
                _, cache = gpt2.run_with_cache(TOKENS, names_filter=everything, grad=grad)
                assert not copies & cache.keys()
    _, cache = gpt2.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("_input"))
    assert len(cache) == 9
    assert cache["q_input", 0].shape == (2, 10, 4, 64)
    seen: list[str] = []
    hooks: Any = [
        (lambda name: name.startswith("blocks.0.hook_"), lambda value, hook: seen.append(hook.name))
    ]
    gpt2.set_use_split_qkv_input(True)
    gpt2.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert [name for name in seen if name in copies] == [f"blocks.0.hook_{letter}_input" for letter in "qkv"]
    seen.clear()
    gpt2.set_use_split_qkv_input(False)
    gpt2.set_use_attn_in(True)
    gpt2.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert [name for name in seen if name in copies] == ["blocks.0.hook_attn_in"]
    gpt2.set_use_attn_in(False)


def test_what_is_refused(gpt2: HookedModel, llama: HookedModel) -> None:
    def double(value: Tensor, hook: Any) -> Tensor:
        return value * 2

    both: Any = [(("q_input", 1), double), ("blocks.1.ln1.hook_out", double)]
    with pytest.raises(
        HookError, match=r"blocks.1.hook_q_input and blocks.1.ln1.hook_out cannot both be edited"
    ):
        gpt2.run_with_hooks(TOKENS, fwd_hooks=both)
    with pytest.raises(HookError, match="heads of this model share keys and values"):
        llama.run_with_hooks(TOKENS, fwd_hooks=[(("attn_in", 1), double)])
    with pytest.raises(HookError, match="cannot both be edited, or have gradients"):
        gpt2.run_with_cache(
            TOKENS, names_filter=["blocks.1.hook_q_input", "blocks.1.ln1.hook_out"], grad=True
        )
    # A function may look at both, and edit both in different layers.
    with gpt2.hooks([("blocks.1.ln1.hook_out", lambda value, hook: None)]):
        looked = gpt2.run_with_hooks(TOKENS, fwd_hooks=both[:1])
    assert torch.equal(looked, gpt2.run_with_hooks(TOKENS, fwd_hooks=both[:1]))
    gpt2.run_with_hooks(TOKENS, fwd_hooks=[(("q_input", 1), double), ("blocks.2.ln1.hook_out", double)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gpt2.hf.modules())

"""Direct calls of the Hugging Face model: refused where they would skip hooks, unchanged by hooks of other models."""

import copy
import gc
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore.errors import HookError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 8), generator=torch.Generator().manual_seed(0))
POST = "blocks.1.hook_resid_post"
SKIPPED = "a direct call of the Hugging Face model, such as generate, would skip them"
RECURSION = "a function on a hook runs its own model"


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def llama(folder: Path) -> HookedModel:
    return HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")


def double(value: Tensor, hook: HookPoint) -> Tensor:
    return value * 2


def has_hooks(model: HookedModel) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


RAW: dict[str, Callable[[HookedModel], object]] = {
    "hf": lambda model: model.hf(TOKENS),
    "base": lambda model: model.base(TOKENS),
    "forward": lambda model: model.hf.forward(TOKENS),
    "generate": lambda model: model.hf.generate(TOKENS, max_new_tokens=2, do_sample=False),
}


@pytest.mark.parametrize("way", RAW)
def test_a_raw_call_while_functions_hang_is_an_error(llama: HookedModel, way: str) -> None:
    call = RAW[way]
    call(llama)
    with llama.hooks([(POST, double)]):
        with pytest.raises(HookError, match=SKIPPED) as caught:
            call(llama)
        assert "\n" not in str(caught.value)
        # Generation in a thread, as with a streamer, and another wrapper, whose hooks are its own.
        with ThreadPoolExecutor(1) as threads, pytest.raises(HookError, match=SKIPPED):
            threads.submit(call, llama).result()
        edited = llama(TOKENS)
        plain = HookedModel(llama.hf, check=False)(TOKENS)
    assert not has_hooks(llama)
    call(llama)
    assert torch.equal(plain, llama(TOKENS))
    assert not torch.equal(edited, plain)


def test_functions_that_stay_are_watched_until_they_are_removed(llama: HookedModel) -> None:
    llama.add_hook(POST, double)
    with llama.hooks([(POST, double)]):
        llama(TOKENS)
    with pytest.raises(HookError, match=SKIPPED):
        llama.hf(TOKENS)
    with llama.hooks([("hook_embed", double)]):
        llama.reset_hooks()
        llama.hf(TOKENS)  # no function hangs anywhere by now
    llama.hf(TOKENS)
    assert not has_hooks(llama)


def test_nothing_is_left_of_a_wrapper_that_is_gone(folder: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = HookedModel(plain, check=False)
    model.add_hook(POST, double)
    with pytest.raises(HookError, match=SKIPPED):
        plain(TOKENS)
    del model
    gc.collect()
    plain(TOKENS)
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_copies_of_a_watched_model_are_free(folder: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = HookedModel(plain, check=False)
    expected = plain(TOKENS).logits
    with model.hooks([(POST, double)]):
        copied = copy.deepcopy(plain)
        file = io.BytesIO()
        torch.save(plain, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert torch.equal(other(TOKENS).logits, expected)


@pytest.mark.parametrize("way", RAW)
@pytest.mark.parametrize("where", ["hook_embed", ("z", 1), ("pattern", 1), ("normalized", 1, "ln1")])
def test_a_function_that_runs_its_model_is_an_error(llama: HookedModel, way: str, where: Any) -> None:
    def run(value: Tensor, hook: HookPoint) -> None:
        RAW[way](llama)

    plain = llama(TOKENS)
    for call in (llama, llama.run_with_cache, lambda tokens: llama(tokens, stop_at_layer=2)):
        with pytest.raises(HookError, match=RECURSION) as caught, llama.hooks([(where, run)]):
            call(TOKENS)
        assert "\n" not in str(caught.value)
    assert not has_hooks(llama)
    assert torch.equal(llama(TOKENS), plain)


def test_a_function_that_runs_its_model_by_way_of_another(llama: HookedModel, tiny_model: TinyModel) -> None:
    other = HookedModel.from_pretrained(str(tiny_model("gpt2")), dtype="float32", device="cpu")
    plain = llama(TOKENS)

    def inner(value: Tensor, hook: HookPoint) -> None:
        llama.hf(TOKENS)

    def outer(value: Tensor, hook: HookPoint) -> None:
        other.run_with_hooks(TOKENS, fwd_hooks=[(POST, inner)])

    with pytest.raises(HookError, match=RECURSION):
        llama.run_with_hooks(TOKENS, fwd_hooks=[(POST, outer)])
    # The other model by itself may run in a function.
    expected, outputs = other(TOKENS), []
    same = llama.run_with_hooks(
        TOKENS, fwd_hooks=[(POST, lambda value, hook: outputs.append(other.hf(TOKENS).logits))]
    )
    assert torch.equal(outputs[0], expected)
    assert torch.equal(same, plain)
    assert not has_hooks(llama)
    assert not has_hooks(other)


@pytest.mark.parametrize("grad", [False, True])
def test_modules_that_a_function_calls_are_not_part_of_the_forward(llama: HookedModel, grad: bool) -> None:
    """In a logit lens inside of a function, the norm's value is not the value of its hook."""
    _, plain = llama.run_with_cache(TOKENS, names_filter="*")
    lens: list[Tensor] = []

    def look(value: Tensor, hook: HookPoint) -> None:
        lens.append(llama.hf.lm_head(llama.hf.model.norm(value)))
        llama.layers[2](value, position_embeddings=llama.hf.model.rotary_emb(value, torch.arange(8)[None]))

    with llama.hooks([(("resid_pre", 1), look)]):
        logits, cache = llama.run_with_cache(TOKENS, grad=grad)
        stream, _ = llama.run_with_cache(TOKENS, stop_at_layer=2)
        _, last = llama.run_with_cache(TOKENS, names_filter="ln_final.hook_scale", return_type=None)
    tolerance = 1e-5 if grad else 0.0  # with a graph, what is named is computed step by step
    for name, value in cache.items():
        torch.testing.assert_close(value.detach(), plain[name], atol=tolerance, rtol=tolerance, msg=name)
    torch.testing.assert_close(logits.detach(), llama(TOKENS), atol=tolerance, rtol=tolerance)
    assert torch.equal(stream, plain["resid_pre", 2])
    assert torch.equal(last["ln_final.hook_scale"], plain["ln_final.hook_scale"])
    torch.testing.assert_close(lens[0].detach(), plain.logit_lens()[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_raw_calls_of_another_thread_are_no_values_of_a_run(tiny_model: TinyModel, family: str) -> None:
    """Without functions on hooks, a direct call is allowed; the run that is under way must not see its values."""
    model = HookedModel.from_pretrained(str(tiny_model(family)), dtype="float32", device="cpu")
    other = TOKENS.flip(0)
    _, expected = model.run_with_cache(TOKENS)
    raw = model.hf(other, use_cache=False).logits.detach()
    stopping = False

    def calls() -> bool:
        same = True
        with torch.no_grad():
            while not stopping:
                same = same and torch.equal(model.hf(other, use_cache=False).logits, raw)
        return same

    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(calls)
        try:
            for _ in range(10):
                _, cache = model.run_with_cache(TOKENS)
                assert all(torch.equal(value, expected[name]) for name, value in cache.items())
        finally:
            stopping = True
        assert result.result()

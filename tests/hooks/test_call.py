"""Forwards over a part of the model, or after positions in a cache: they give what one forward over all gives."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig

from actstore.errors import HookError, TokensError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.parity.families import FAMILIES, VARIANTS

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> HookedModel:
    return HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> HookedModel:
    return load(tiny_model("llama"))


def padded() -> Tensor:
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 0
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_starting_at_a_layer_is_the_rest_of_a_whole_forward(tiny_model: TinyModel, family: str) -> None:
    model = load(tiny_model(family))
    mask = padded()
    logits, whole = model.run_with_cache(TOKENS, attention_mask=mask)
    real = mask.bool()
    for layer, given in ((0, 0), (1, 1), (2, -1), (3, 3)):
        stream = whole["resid_pre", layer] if layer < 3 else whole["resid_post", 2]
        out, cache = model.run_with_cache(stream, start_at_layer=given, attention_mask=mask)
        torch.testing.assert_close(out[real], logits[real], atol=1e-5, rtol=1e-5)
        layers = {int(name.split(".")[1]) for name in cache if name.startswith("blocks")}
        assert layers == set(range(layer, 3))
        assert "ln_final.hook_scale" in cache
        assert "hook_embed" not in cache
        for name, value in cache.items():
            if "attn_scores" not in name:
                axis = 2 if "pattern" in name else 1
                rows = (value[1].movedim(axis - 1, 0)[3:], whole[name][1].movedim(axis - 1, 0)[3:])
                torch.testing.assert_close(*rows, atol=1e-5, rtol=1e-5, msg=partial("{} {}".format, name))
    part = model(whole["resid_pre", 1], start_at_layer=1, stop_at_layer=2, attention_mask=mask)
    torch.testing.assert_close(part[real], whole["resid_pre", 2][real], atol=1e-5, rtol=1e-5)
    nothing = model(whole["resid_pre", 1], start_at_layer=1, stop_at_layer=1)
    assert torch.equal(nothing, whole["resid_pre", 1])


def test_functions_act_on_the_layers_that_are_run(llama: HookedModel) -> None:
    seen: list[str] = []
    stream, ids, _, mask = llama.input_to_embed(TOKENS)
    assert torch.equal(ids, TOKENS)
    assert mask is None
    assert torch.equal(stream, llama.run_with_cache(TOKENS, names_filter="hook_embed")[1]["hook_embed"])
    logits = llama(TOKENS)
    torch.testing.assert_close(llama(stream, start_at_layer=0), logits)
    other = llama(TOKENS, stop_at_layer=2) + 1.0
    expected = llama.run_with_hooks(TOKENS, fwd_hooks=[(("resid_pre", 2), lambda value, hook: value + 1.0)])
    with llama.hooks([("blocks.*.hook_resid_pre", lambda value, hook: seen.append(hook.name))]):
        torch.testing.assert_close(llama(other, start_at_layer=2), expected)
    assert seen == ["blocks.2.hook_resid_pre"]
    loss = llama(stream, "loss", start_at_layer=0, tokens=TOKENS)
    torch.testing.assert_close(loss, llama(TOKENS, "loss"))
    torch.testing.assert_close(llama.loss_fn(logits, TOKENS), loss)
    torch.testing.assert_close(llama.loss_fn(logits, TOKENS, per_token=True), llama(TOKENS, "loss", True))
    texts = ["My lord, I came", "to see your father's funeral, and"]
    stream, _, _, mask = llama.input_to_embed(texts, padding_side="left")
    assert mask is not None
    whole = llama(texts, padding_side="left")
    rest = llama(stream, start_at_layer=0, attention_mask=mask)
    torch.testing.assert_close(rest[mask.bool()], whole[mask.bool()])


def test_gradients_reach_the_given_stream(llama: HookedModel) -> None:
    stream = llama(TOKENS, stop_at_layer=1).requires_grad_()
    torch.autograd.backward(llama(stream, start_at_layer=1, grad=True)[0, -1, 7])
    logits, cache = llama.run_with_cache(TOKENS, names_filter=("resid_pre", 1), grad=True)
    torch.testing.assert_close(stream.grad, cache.gradients(logits[0, -1, 7])["resid_pre", 1])
    plain = stream.detach()
    logits, cache = llama.run_with_cache(plain, start_at_layer=1, names_filter=("resid_pre", 1), grad=True)
    torch.testing.assert_close(cache.gradients(logits[0, -1, 7])["resid_pre", 1], stream.grad)


@pytest.mark.parametrize(
    "variant", ["gpt2", "gpt_neo-window", "gpt_neox", "gptj", "llama", "gemma2-window", "opt"]
)
@pytest.mark.parametrize("has_padding", [False, True], ids=["whole", "padded"])
def test_positions_after_those_in_a_cache(tiny_model: TinyModel, variant: str, has_padding: bool) -> None:
    family, fields = VARIANTS[variant]
    model = load(tiny_model(family, **fields))
    mask = padded() if has_padding else None
    logits, whole = model.run_with_cache(TOKENS, attention_mask=mask)
    past = DynamicCache()
    for start, stop in ((0, 4), (4, 5), (5, 10)):
        part, cache = model.run_with_cache(
            TOKENS[:, start:stop],
            past_kv_cache=past,
            attention_mask=None if mask is None else mask[:, :stop],
        )
        assert past.get_seq_length() == stop
        real = slice(max(3 - start, 0) if has_padding else 0, None)
        torch.testing.assert_close(part[:, real], logits[:, start:stop][:, real], atol=1e-5, rtol=1e-4)
        for name, value in cache.items():
            expected = whole[name]
            if name.endswith(("scores", "pattern")):
                expected = expected[:, :, start:stop, :stop][:, :, real]
                value = value[:, :, real]
            else:
                expected, value = expected[:, start:stop][:, real], value[:, real]
            torch.testing.assert_close(
                value, expected, atol=1e-5, rtol=1e-4, msg=partial("{} {}".format, name)
            )
    assert model(TOKENS[:, :1], return_type=None, past_kv_cache=past) is None
    assert past.get_seq_length() == 11


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_cache_is_masked_in_later_calls(llama: HookedModel, side: Any) -> None:
    """By ids without a mask, by text, and in a copy of the cache, which is how a cache is kept as it is."""
    texts, more = ["My lord, I came", "to see your father's funeral, and"], [" it", " all the while"]
    past = DynamicCache()
    llama(texts, past_kv_cache=past, padding_side=side)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    by_ids = llama(ids, past_kv_cache=copy.deepcopy(past))
    by_text = llama(more, past_kv_cache=past, prepend_bos=False)
    then = llama(ids, past_kv_cache=past)
    for row, (text, its_more) in enumerate(zip(texts, more, strict=True)):
        begin, end = llama.to_tokens(text), llama.to_tokens(its_more, prepend_bos=False)
        tail = ids[row : row + 1]
        alone = llama(torch.cat([begin, tail], 1))[0, -3:]
        torch.testing.assert_close(by_ids[row], alone, atol=1e-5, rtol=1e-4)
        alone = llama(torch.cat([begin, end, tail], 1))[0, begin.shape[1] :]
        torch.testing.assert_close(by_text[row, : end.shape[1]], alone[:-3], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(then[row], alone[-3:], atol=1e-5, rtol=1e-4)
    with pytest.raises(TokensError, match="past_kv_cache has 2 rows, and the tokens have 1; give as many"):
        llama(ids[:1], past_kv_cache=past)


def test_a_call_that_fails_leaves_its_cache_as_it_was(llama: HookedModel) -> None:
    expected = llama(TOKENS)[:, 4:]
    empty, filled = DynamicCache(), DynamicCache()
    llama(TOKENS[:, :4], past_kv_cache=filled)

    def fail(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError

    for past, ids in ((empty, TOKENS[:, :4]), (filled, TOKENS[:, 4:])):
        with pytest.raises(ZeroDivisionError), llama.hooks([(("attn_out", 1), fail)]):
            llama(ids, past_kv_cache=past)
    assert filled.get_seq_length() == 4
    torch.testing.assert_close(llama(TOKENS[:, 4:], past_kv_cache=filled), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(llama(TOKENS, past_kv_cache=empty)[:, 4:], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_in_a_cache_stays_masked(tiny_model: TinyModel, family: str) -> None:
    """Later calls say nothing of padding that an earlier one had, or only of their own tokens."""
    model = load(tiny_model(family))
    texts, ends = ["To be, or not to be", "To be"], [" that is", " that is"]
    new = model.to_tokens(ends, prepend_bos=False)
    alone = [model(torch.cat([model.to_tokens(text), new[:1]], dim=1))[0, -new.shape[1] :] for text in texts]
    ids, mask = model.to_tokens_and_mask(texts, padding_side="left")

    def filled(**options: Any) -> DynamicCache:
        past = DynamicCache()
        model(ids, past_kv_cache=past, **options)
        return past

    ways: list[Callable[[], Tensor]] = [
        lambda: model(new, past_kv_cache=filled(attention_mask=mask)),
        lambda: model(ends, prepend_bos=False, past_kv_cache=filled(attention_mask=mask)),
        lambda: model(new, attention_mask=torch.ones_like(new), past_kv_cache=filled(attention_mask=mask)),
    ]
    for way in ways:
        torch.testing.assert_close(way(), torch.stack(alone), atol=1e-4, rtol=1e-4)
    unmasked = model(new, past_kv_cache=filled())
    assert not torch.allclose(unmasked[1], alone[1], atol=0.01)
    # A cache that has been cropped, or went on without this model, and one token at a time.
    past = filled(attention_mask=mask)
    model(new, past_kv_cache=past)
    past.crop(-new.shape[1])
    for place in range(new.shape[1]):
        logits = model(new[:, place, None], past_kv_cache=past)
        expected = torch.stack([row[place] for row in alone])
        torch.testing.assert_close(logits[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_what_is_refused(llama: HookedModel) -> None:
    stream = llama(TOKENS, stop_at_layer=1)
    past = DynamicCache()
    config = MistralConfig(sliding_window=4, num_hidden_layers=3)
    sliding = DynamicCache(config=config)
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (
            lambda: llama(stream, start_at_layer=4),
            HookError,
            "start_at_layer is 4; this model has layers 0 to 2",
        ),
        (
            lambda: llama(TOKENS, start_at_layer=1),
            HookError,
            r"is the residual stream \[batch, position, 64\]",
        ),
        (lambda: llama("text", start_at_layer=1), HookError, "is the residual stream"),
        (lambda: llama(stream[0], start_at_layer=1), HookError, r"has shape \[10, 64\]"),
        (
            lambda: llama(stream, start_at_layer=2, stop_at_layer=1),
            HookError,
            "start at layer 2 and end before",
        ),
        (lambda: llama(stream, "loss", start_at_layer=1), TokensError, "give tokens"),
        (lambda: llama(TOKENS, tokens=TOKENS), TokensError, "tokens go with start_at_layer"),
        (
            lambda: llama.run_with_cache(stream, start_at_layer=1, names_filter=("resid_post", 0)),
            HookError,
            "blocks.0.hook_resid_post comes before start_at_layer=1",
        ),
        (lambda: llama(TOKENS, past_kv_cache=[]), HookError, r"give transformers.DynamicCache\(\)"),
        (lambda: llama(TOKENS, past_kv_cache=sliding), HookError, "drops keys outside of a window"),
        (lambda: llama(TOKENS, stop_at_layer=1, past_kv_cache=past), HookError, "leave out one of the two"),
        (lambda: llama(TOKENS, grad=True, past_kv_cache=past), HookError, "gradients do not reach the keys"),
        (lambda: llama.run_with_cache(TOKENS, reset_hooks_end=False), HookError, "get_caching_hooks"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert past.get_seq_length() == 0


def test_arguments_of_transformerlens(llama: HookedModel) -> None:
    loss = llama(TOKENS, return_type="loss")
    assert torch.equal(llama.run_with_hooks(TOKENS, "loss"), loss)
    value, values = llama.run_with_cache(
        TOKENS, "loss", return_cache_object=False, names_filter=("resid_post", 0)
    )
    assert torch.equal(value, loss)
    assert isinstance(values, dict)
    assert values.keys() == {"blocks.0.hook_resid_post"}
    from transformer_lens.utilities import Slice

    for given in (Slice((2, 5)), Slice(None), Slice([1, 3])):
        raw: Any = given.slice
        _, sliced = llama.run_with_cache(TOKENS, pos_slice=given)
        _, expected = llama.run_with_cache(TOKENS, pos_slice=None if given.mode == "identity" else raw)
        assert all(torch.equal(sliced[name], expected[name]) for name in expected)


def test_functions_stay_if_they_shall(llama: HookedModel) -> None:
    plain = llama(TOKENS)

    def count(value: Tensor, hook: Any) -> Tensor:
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1
        return value * 2

    with llama.hooks([(("resid_post", 0), count)], clear_contexts=True) as same:
        assert same is llama
        doubled = llama(TOKENS)
    assert torch.equal(llama(TOKENS), plain)
    assert llama.run_with_hooks(TOKENS, fwd_hooks=[(("resid_post", 0), count)], reset_hooks_end=False).equal(
        doubled
    )
    assert torch.equal(llama(TOKENS), doubled)
    assert llama._functions.point("blocks.0.hook_resid_post").ctx == {"n": 2}
    llama.reset_hooks()
    assert torch.equal(llama(TOKENS), plain)

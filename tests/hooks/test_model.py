"""A hooked model as people use it: caching what they name, changing values on the way, leaving nothing behind."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import actstore
from actstore.errors import HookError, ModelError, TokensError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.parity.families import FAMILIES

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))
POST = "blocks.1.hook_resid_post"


def load(folder: Path) -> HookedModel:
    return actstore.HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> HookedModel:
    return load(tiny_model("llama"))


@pytest.fixture(scope="module")
def gpt2(tiny_model: TinyModel) -> HookedModel:
    return load(tiny_model("gpt2"))


def has_hooks(model: HookedModel) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


# Caching


def test_everything_is_cached_by_default(llama: HookedModel) -> None:
    logits, cache = llama.run_with_cache(TOKENS)
    assert tuple(cache.keys()) == llama.names.select("*")
    assert torch.equal(logits, llama.hf(TOKENS).logits)
    assert not any(value.requires_grad for value in cache.values())


@pytest.mark.parametrize(
    "chosen",
    [
        POST,
        [POST],
        ("resid_post", 1),
        [("resid_post", -2)],
        "blocks.1.hook_out",
        "model.layers.1",
        "*.1.hook_resid_post",
        lambda name: name == POST,
    ],
)
def test_only_what_is_named_is_cached(llama: HookedModel, chosen: Any) -> None:
    _, cache = llama.run_with_cache(TOKENS, names_filter=chosen)
    assert list(cache.keys()) == [POST]


def test_a_function_selects_just_what_it_says(llama: HookedModel) -> None:
    _, cache = llama.run_with_cache(TOKENS, names_filter=lambda name: True)
    assert tuple(cache.keys()) == llama.names.select("*")
    assert "blocks.0.attn.hook_result" not in cache
    _, cache = llama.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_result"))
    assert len(cache) == 3


def test_a_filter_that_matches_nothing_is_an_error(llama: HookedModel) -> None:
    with pytest.raises(HookError, match="nearest names are blocks.1.hook_resid_post"):
        llama.run_with_cache(TOKENS, names_filter="blocks.1.hook_resid_pots")
    with pytest.raises(HookError, match="says no to every hook"):
        llama.run_with_cache(TOKENS, names_filter=lambda _: False)


def test_positions(llama: HookedModel) -> None:
    _, whole = llama.run_with_cache(TOKENS)
    choices: list[tuple[Any, Any]] = [
        (3, [3]),  # the axis stays, as in TransformerLens
        (-1, [-1]),
        (torch.tensor(4), [4]),
        ([2, 5], [2, 5]),
        ((2, 6), slice(2, 6)),
        (slice(None, 4), slice(4)),
    ]
    for positions, index in choices:
        _, cache = llama.run_with_cache(TOKENS, pos_slice=positions)
        assert torch.equal(cache[POST], whole[POST][:, index])
        assert torch.equal(cache["z", 0], whole["z", 0][:, index])
        assert torch.equal(cache["pattern", 0], whole["pattern", 0][:, :, index])
    with pytest.raises(HookError, match="position 10 is outside of the 10 positions"):
        llama.run_with_cache(TOKENS, pos_slice=10)


def test_stopping_at_a_layer_gives_the_stream_into_it(llama: HookedModel) -> None:
    _, whole = llama.run_with_cache(TOKENS)
    for layer, name in (
        (0, ("resid_pre", 0)),
        (1, ("resid_pre", 1)),
        (-1, ("resid_pre", 2)),
        (3, ("resid_post", 2)),
    ):
        stream, cache = llama.run_with_cache(TOKENS, stop_at_layer=layer)
        assert torch.equal(stream, whole[name])
        assert {int(key.split(".")[1]) for key in cache if key.startswith("blocks")} == set(
            range(layer % 3 or layer)
        )
    both: Any = [("resid_post", 0), POST]
    for chosen in (POST, both):
        with pytest.raises(HookError, match="blocks.1.hook_resid_post comes after stop_at_layer=1"):
            llama.run_with_cache(TOKENS, stop_at_layer=1, names_filter=chosen)
    with pytest.raises(HookError, match="stop_at_layer is 4; this model has layers 0 to 2"):
        llama(TOKENS, stop_at_layer=4)


def test_remove_batch_dim(llama: HookedModel) -> None:
    _, cache = llama.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    assert cache[POST].shape == (10, 64)
    with pytest.raises(HookError, match="needs one row, and there are 2"):
        llama.run_with_cache(TOKENS, remove_batch_dim=True)


def test_loss(llama: HookedModel) -> None:
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = 0
    logits, loss = llama(TOKENS, return_type="both", attention_mask=mask)
    labels = TOKENS.masked_fill(mask == 0, -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    per_token = llama(TOKENS, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(per_token.mean(), llama.hf(TOKENS, labels=TOKENS).loss)
    assert llama(TOKENS, return_type=None) is None


def test_values_are_copies(gpt2: HookedModel) -> None:
    def zero(value: Tensor, hook: HookPoint) -> None:
        value.zero_()

    _, before = gpt2.run_with_cache(TOKENS, names_filter=POST)
    with gpt2.hooks([("blocks.2.hook_resid_pre", zero)]):
        _, cache = gpt2.run_with_cache(TOKENS, names_filter=[POST, "blocks.2.hook_resid_pre"])
    assert torch.equal(cache[POST], before[POST])
    assert (cache["resid_pre", 2] == 0).all()


# Changing values


def test_a_replaced_stream_is_what_later_layers_see(llama: HookedModel) -> None:
    other = TOKENS.flip(0)
    _, source = llama.run_with_cache(other)

    def swap(_value: Tensor, hook: HookPoint) -> Tensor:
        return source[hook.name]

    expected = llama(other)
    for name in (
        "blocks.0.hook_resid_pre",
        POST,
        "blocks.2.hook_resid_pre",
        "hook_embed",
        "blocks.2.hook_resid_mid",
    ):
        logits = llama.run_with_hooks(TOKENS, fwd_hooks=[(name, swap)])
        # From resid_mid of the last layer on, all is the other run; from the others as well.
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5, msg=name)
    assert not torch.equal(llama(TOKENS), expected)


def test_routers_can_be_read_and_not_changed(tiny_model: TinyModel) -> None:
    model = load(tiny_model("mixtral"))
    with pytest.raises(HookError, match="can be read but not changed"):
        model.run_with_hooks(
            TOKENS, fwd_hooks=[("blocks.0.mlp.hook_expert_weights", lambda value, hook: value * 2)]
        )


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2", "qwen3_moe"])
def test_a_function_that_only_looks_changes_no_bit(tiny_model: TinyModel, family: str) -> None:
    model = HookedModel.from_pretrained(str(tiny_model(family)), dtype="bfloat16", device="cpu")
    plain = model(TOKENS)
    seen: list[str] = []
    names = [*model.names]
    looked = model.run_with_hooks(TOKENS, fwd_hooks=[(names, lambda value, hook: seen.append(hook.name))])
    assert torch.equal(looked, plain)
    assert seen == names


def test_routers_cannot_be_edited_in_place_either(tiny_model: TinyModel) -> None:
    model = load(tiny_model("mixtral"))
    for leaf in ("hook_expert_weights", "hook_expert_indices"):
        with pytest.raises(HookError, match="can be read but not changed"):
            model.run_with_hooks(
                TOKENS, fwd_hooks=[(f"blocks.0.mlp.{leaf}", lambda value, hook: value.zero_())]
            )


def test_threads_take_turns(llama: HookedModel) -> None:
    """Hooks on modules belong to one forward; two at once would fill each other's caches."""
    rows = [
        torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(seed)) for seed in range(2)
    ]
    expected = [llama.run_with_cache(row)[1].cache_dict for row in rows]

    def run(index: int) -> bool:
        _, cache = llama.run_with_cache(rows[index % 2])
        values = cache.cache_dict
        return values.keys() == expected[index % 2].keys() and all(
            torch.equal(value, expected[index % 2][name]) for name, value in values.items()
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(40)))


def test_a_function_cannot_run_its_own_model(llama: HookedModel) -> None:
    other = HookedModel(llama.hf)
    for model in (llama, other):
        with pytest.raises(HookError, match="runs its own model"):
            llama.run_with_hooks(TOKENS, fwd_hooks=[(POST, lambda value, hook, model=model: model(TOKENS))])
    assert not has_hooks(llama)
    assert torch.equal(llama(TOKENS), other(TOKENS))


def test_the_input_of_the_mlp_alone_can_be_changed(llama: HookedModel) -> None:
    """hook_resid_mid is the stream itself, hook_mlp_in only the copy that the MLP reads."""

    def zero(value: Tensor, hook: HookPoint) -> Tensor:
        return torch.zeros_like(value)

    _, plain = llama.run_with_cache(TOKENS)
    names = ["blocks.1.hook_mlp_out", POST]
    with llama.hooks([("blocks.1.hook_mlp_in", zero)]):
        _, alone = llama.run_with_cache(TOKENS, names_filter=names)
    torch.testing.assert_close(alone[POST], plain["resid_mid", 1] + alone["mlp_out", 1])
    with llama.hooks([("blocks.1.hook_resid_mid", zero)]):
        _, stream = llama.run_with_cache(TOKENS, names_filter=names)
    torch.testing.assert_close(stream[POST], stream["mlp_out", 1])


def test_functions_are_called_in_order_with_their_hook(llama: HookedModel) -> None:
    seen: list[tuple[str, str, int]] = []

    def first(value: Tensor, hook: HookPoint) -> Tensor:
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1
        seen.append(("first", hook.name, hook.layer()))
        return value + 1

    def second(value: Tensor, hook: HookPoint) -> None:
        seen.append(("second", hook.name, hook.ctx["n"]))

    llama.run_with_hooks(TOKENS, fwd_hooks=[("*.hook_mlp_out", first), (("mlp_out", 1), second)])
    assert seen == [
        ("first", "blocks.0.hook_mlp_out", 0),
        ("first", "blocks.1.hook_mlp_out", 1),
        ("second", "blocks.1.hook_mlp_out", 1),
        ("first", "blocks.2.hook_mlp_out", 2),
    ]
    llama.reset_hooks()


def test_what_a_function_may_give(llama: HookedModel) -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda value, hook: value[:1], "gave shape"),
        (lambda value, hook: 3, "gave int"),
    ]
    for given, message in wrong:
        with pytest.raises(HookError, match=f"{message}.*give a tensor of shape"):
            llama.run_with_hooks(TOKENS, fwd_hooks=[(POST, given)])
    assert not has_hooks(llama)
    other: Any = lambda value, point: value  # noqa: E731 - it has another name than `hook`
    with pytest.raises(HookError, match=r"cannot be called as function\(value, hook=point\)"):
        llama.run_with_hooks(TOKENS, fwd_hooks=[(POST, other)])
    no_list: Any = (POST, other)
    with pytest.raises(HookError, match=r"expected pairs of \(name, function\)"):
        llama.run_with_hooks(TOKENS, fwd_hooks=no_list)


# Leaking


def test_hooks_do_not_leak(llama: HookedModel) -> None:
    plain = llama(TOKENS)

    def fail(value: Tensor, hook: HookPoint) -> None:
        raise RuntimeError("inside of a hook")

    def double(value: Tensor, hook: HookPoint) -> Tensor:
        return value * 2

    for name in (POST, "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_q", "ln_final.hook_scale"):
        with pytest.raises(RuntimeError, match="inside of a hook"):
            llama.run_with_hooks(TOKENS, fwd_hooks=[(name, double), (name, fail)])
        assert not has_hooks(llama)
        assert torch.equal(llama(TOKENS), plain)
    with llama.hooks([(POST, double)]):
        assert not torch.equal(llama(TOKENS), plain)
    with pytest.raises(RuntimeError, match="elsewhere"):
        _fail_in_context(llama, double)
    assert torch.equal(llama(TOKENS), plain)


def _fail_in_context(model: HookedModel, function: Any) -> None:
    with model.hooks([(POST, function)]):
        raise RuntimeError("elsewhere")


def test_a_context_takes_away_the_one_that_it_added(llama: HookedModel) -> None:
    """A function that is there twice: the functions that stay keep their order."""
    seen: list[str] = []

    def first(_value: Tensor, hook: HookPoint) -> None:
        seen.append("first")

    def second(_value: Tensor, hook: HookPoint) -> None:
        seen.append("second")

    def run() -> list[str]:
        seen.clear()
        llama(TOKENS)
        return seen[:]

    try:
        llama.add_hook(POST, first)
        llama.add_hook(POST, second)
        with llama.hooks([(POST, first)]):
            assert run() == ["first", "second", "first"]
        assert run() == ["first", "second"]
    finally:
        llama.reset_hooks()


def test_contexts_nest(llama: HookedModel) -> None:
    plain = llama(TOKENS)

    def double(value: Tensor, hook: HookPoint) -> Tensor:
        return value * 2

    llama.add_hook(POST, double)
    once = llama(TOKENS)
    with llama.hooks([(POST, double)]):
        twice = llama(TOKENS)
        assert not torch.equal(twice, once)
        llama.add_hook(("mlp_out", 0), double)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(llama(TOKENS), once)  # what was added inside of a context stays
    llama.reset_hooks()
    llama.add_hook(POST, double)
    assert torch.equal(llama(TOKENS), once)
    llama.reset_hooks()
    assert torch.equal(llama(TOKENS), plain)


# Gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_respect_to_any_hook(tiny_model: TinyModel, family: str) -> None:
    """Gradients equal a finite difference that edits the same hook."""
    model = load(tiny_model(family))
    tokens = TOKENS[:1, :6]
    wanted = [
        name
        for name in model.names.select("*")
        if "expert" not in name and (name.startswith(("blocks.1.", "hook_", "ln_final.")))
    ]
    logits, cache = model.run_with_cache(tokens, names_filter=wanted, grad=True)
    target = logits[0, -1, 7]
    gradients = torch.autograd.grad(target, [cache[name] for name in wanted])
    for name, gradient in zip(wanted, gradients, strict=True):
        value = cache[name].detach()
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        direction = torch.where(value.isfinite(), direction, 0.0)
        step = 1e-2 / direction.norm()
        ends = [_last_logit(model, tokens, name, value + sign * step * direction) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        derivative = (gradient.double().nan_to_num() * direction.double()).sum()
        assert abs(derivative - expected) <= 0.03 * abs(expected) + 0.02 * gradient.norm(), (
            name,
            derivative,
            expected,
        )


def _last_logit(model: HookedModel, tokens: Tensor, name: str, value: Tensor) -> Tensor:
    """With one hook set to a value."""
    logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda _value, hook: value)])
    return logits[0, -1, 7].double()


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "z1", "pattern1", "q0"]
)
def test_edits_and_gradients_go_together(llama: HookedModel, name: str) -> None:
    """Edits in place, and functions that keep their value, must not reach what autograd has saved."""

    def in_place(value: Tensor, hook: HookPoint) -> None:
        value[:, -1] = 0

    def squared(value: Tensor, hook: HookPoint) -> Tensor:
        scaled: Tensor = value * value.norm(dim=-1, keepdim=True)
        return scaled

    for function in (in_place, squared):
        with llama.hooks([(name, function)]):
            logits, cache = llama.run_with_cache(TOKENS, names_filter=["hook_embed", POST], grad=True)
            plain = llama(TOKENS)
        torch.testing.assert_close(logits.detach(), plain, atol=1e-5, rtol=1e-4)
        gradients = torch.autograd.grad(logits[0, 3].sum(), list(cache.values()))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_later_edit_does_not_reach_a_cached_value_with_a_graph(llama: HookedModel) -> None:
    def zero(value: Tensor, hook: HookPoint) -> None:
        value.zero_()

    with llama.hooks([("blocks.2.hook_resid_pre", zero)]):
        _, cache = llama.run_with_cache(TOKENS, names_filter=POST, grad=True)
    assert (cache[POST] != 0).any()


def test_gradients_of_padded_rows_are_numbers(llama: HookedModel) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    logits, cache = llama.run_with_cache(TOKENS, attention_mask=mask, grad=True)
    gradients = torch.autograd.grad(logits[:, -1].sum(), list(cache.values()))
    for name, gradient in zip(cache.keys(), gradients, strict=True):
        assert gradient.isfinite().all(), name


def test_gradients_are_off_unless_asked_for(llama: HookedModel) -> None:
    logits, cache = llama.run_with_cache(TOKENS)
    assert not logits.requires_grad
    assert not cache[POST].requires_grad
    # What is cached can be trained on.
    weight = torch.zeros(64, requires_grad=True)
    (gradient,) = torch.autograd.grad((cache[POST] @ weight).sum(), weight)
    assert gradient.abs().sum() > 0


# Input


def test_text(llama: HookedModel) -> None:
    tokens = llama.to_tokens("To be, or not")
    assert tokens[0, 0] == llama.tokenizer.bos_token_id
    assert torch.equal(llama("To be, or not"), llama(tokens))
    bare = llama.to_tokens("To be, or not", prepend_bos=False)
    assert torch.equal(bare, tokens[:, 1:])
    assert torch.equal(llama("To be, or not", prepend_bos=False), llama(bare))
    assert llama.to_string(bare) == ["To be, or not"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_different_length_are_padded_and_masked(llama: HookedModel, side: Any) -> None:
    texts = ["To be, or not to be: that is the question", "To be"]
    logits = llama(texts, padding_side=side)
    for row, text in zip(logits, texts, strict=True):
        alone = llama(text)[0]
        real = row[-len(alone) :] if side == "left" else row[: len(alone)]
        torch.testing.assert_close(real, alone, atol=1e-5, rtol=1e-4)


def test_lists_of_ids_and_masks(llama: HookedModel) -> None:
    assert torch.equal(llama(TOKENS.tolist()), llama(TOKENS))
    assert torch.equal(llama(TOKENS[0].tolist()), llama(TOKENS[:1]))
    texts = ["To be, or not to be", "To be"]
    ids, mask = llama.to_tokens_and_mask(texts, padding_side="left")
    assert torch.equal(llama(ids, attention_mask=mask), llama(texts, padding_side="left"))
    with pytest.raises(TokensError, match="attention_mask is made from the text"):
        llama(texts, attention_mask=mask)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 3), "expected token ids"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "expected token ids"),
        (torch.zeros(1, 0, dtype=torch.int64), "expected token ids"),
        (torch.tensor([[1, 300]]), "token id 300 is outside of the 300 ids"),
        (torch.tensor([[1, -2]]), "token id -2 is outside of the 300 ids"),
        (torch.zeros(1, 129, dtype=torch.int64), "rows of 129 tokens are longer than the 128"),
        (["a", 3], "expected a text or a list of texts"),
    ],
)
def test_what_is_no_input(llama: HookedModel, tokens: Any, message: str) -> None:
    with pytest.raises(TokensError, match=message):
        llama(tokens)


def test_a_model_without_tokenizer_or_head(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(str(tiny_model("llama")), device="cpu", has_head=False)
    with pytest.raises(TokensError, match="without a tokenizer"):
        model("text")
    with pytest.raises(ModelError, match="without its head; choose return_type=None"):
        model(TOKENS)
    _, cache = model.run_with_cache(TOKENS, return_type=None)
    assert POST in cache


def test_repr(llama: HookedModel) -> None:
    assert "llama, 3 layers, d_model 64, float32 on cpu, sdpa attention>" in repr(llama)

"""The cache of a run: its names, what it computes, and the residual stream taken apart."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actstore.errors import HookError, ModelError, TokensError
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.hooks.model import HookedModel
from tests.parity import bridge

TinyModel = Callable[..., Path]
Load = Callable[[str], HookedModel]
SANDWICH = ("gemma2", "gemma3_text")
MIXTURES = ("mixtral", "qwen2_moe")
TYPES = (
    *("gpt2", "llama", "gpt_neox", "gpt_neox sequential", "gptj", "gpt_neo", "opt", "phi", "phi3", "gemma"),
    *("qwen3", *MIXTURES, *SANDWICH),
)

LABELLED = (
    *("accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results"),
    "get_full_resid_decomposition",
)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def some_tokens(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def load(tiny_model: TinyModel) -> Load:
    """A function that loads a model of a type, once."""

    @functools.cache
    def load(kind: str) -> HookedModel:
        name, _, sequential = kind.partition(" ")
        folder = tiny_model(name, use_parallel_residual=False) if sequential else tiny_model(name)
        return HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")

    return load


def caching(model: HookedModel, names_filter: Any = None, **options: Any) -> ActivationCache:
    _, cache = model.run_with_cache(some_tokens(), names_filter=names_filter, **options)
    return cache


def only(cache: ActivationCache, names: Sequence[str], *, has_model: bool = True) -> ActivationCache:
    """A cache that holds only these hooks."""
    values = {name: cache.cache_dict[name] for name in names}
    return ActivationCache(
        values, cache.model if has_model else None, names=cache.names, cfg=cache.cfg, kind=cache.kind
    )


@pytest.fixture
def gpt2(load: Load) -> HookedModel:
    return load("gpt2")


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post"),
        (("resid_post", 1), "blocks.1.hook_resid_post"),
        (("resid_post", -1), "blocks.2.hook_resid_post"),
        (("scale", 1, "ln2"), "blocks.1.ln2.hook_scale"),
        (("attn", 0), "blocks.0.attn.hook_pattern"),
        (("scale", None), "ln_final.hook_scale"),
        ("k2", "blocks.2.attn.hook_k"),
        ("embed", "hook_embed"),
        ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
        ("blocks.1.attn.o.hook_in", "blocks.1.attn.hook_z"),
        ("transformer.h.1", "blocks.1.hook_resid_post"),
        ("h.1.mlp", "blocks.1.hook_mlp_out"),
        ("transformer.wte", "hook_embed"),
    ],
)
def test_every_spelling_of_a_name(gpt2: HookedModel, name: Any, canonical: str) -> None:
    cache = caching(gpt2)
    assert name in cache
    assert cache[name] is cache.cache_dict[canonical]


def test_it_is_a_mapping_of_what_it_holds(gpt2: HookedModel) -> None:
    cache = caching(gpt2, [("resid_post", 1), "blocks.*.hook_mlp_out", "hook_embed"])
    names = ["hook_embed", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    names.append("blocks.2.hook_mlp_out")
    assert list(cache) == list(cache.keys()) == list(cache.cache_dict) == names
    assert len(cache) == 5
    assert [value.shape for value in cache.values()] == [(2, 16, 64)] * 5
    assert dict(cache.items()) == cache.cache_dict
    assert cache.has_embed
    assert not cache.has_pos_embed
    # What can be computed is not held.
    derived: Any = ("resid_pre", 2)
    assert derived not in cache
    assert cache["resid_pre", 2] is cache["resid_post", 1]
    for wrong in ("blocks.9.hook_mlp_out", "no such", ("resid_post", 9), 5, None, ["hook_embed"]):
        assert wrong not in cache
    assert cache.get("blocks.0.hook_attn_out") is None
    assert cache != caching(gpt2)
    assert len({cache, cache}) == 1


def test_repr_tells_names_and_shapes(gpt2: HookedModel) -> None:
    text = repr(caching(gpt2, ["blocks.*.hook_resid_post", "hook_embed", "k1"]))
    assert "5 hooks of" in text
    assert "float32 on cpu" in text
    assert "\n  hook_embed                [2, 16, 64]\n" in text
    assert "\n  blocks.*.hook_resid_post  [2, 16, 64]\n" in text
    assert text.endswith("\n  blocks.1.attn.hook_k      [2, 16, 4, 16]>")
    assert "0 hooks" in repr(only(caching(gpt2), []))


def test_rows_can_be_chosen(gpt2: HookedModel) -> None:
    cache = caching(gpt2)
    name = "blocks.1.attn.hook_pattern"
    first = cache.apply_slice_to_batch_dim(0)
    assert not first.has_batch_dim
    assert torch.equal(first[name], cache[name][0])
    assert torch.equal(cache.apply_slice_to_batch_dim((1, 2))[name], cache[name][1:])
    assert torch.equal(cache.apply_slice_to_batch_dim([1, 0])[name], cache[name].flip(0))
    with pytest.raises(HookError, match="row 2 is outside of the 2 rows"):
        cache.apply_slice_to_batch_dim(2)
    with pytest.raises(HookError, match="one row without a batch axis"):
        first.apply_slice_to_batch_dim(0)
    with pytest.raises(HookError, match="remove_batch_dim needs one row, and there are 2"):
        cache.remove_batch_dim()


def test_without_a_batch_axis_all_is_the_same(gpt2: HookedModel) -> None:
    whole = caching(gpt2)
    cache = whole.apply_slice_to_batch_dim([1])
    assert cache.remove_batch_dim() is cache
    assert cache.remove_batch_dim()["q0"].shape == (16, 4, 16)
    full = cache.get_full_resid_decomposition(apply_ln=True)
    assert_near(full, whole.get_full_resid_decomposition(apply_ln=True)[:, 1])
    assert_near(cache.accumulated_resid(apply_ln=True), whole.accumulated_resid(apply_ln=True)[:, 1])
    stack = cache.decompose_resid()
    tokens = some_tokens()
    assert_near(
        cache.logit_attrs(stack, tokens[1], has_batch_dim=False),
        whole.logit_attrs(whole.decompose_resid(), tokens)[:, 1],
    )


def test_to_moves_all_values(gpt2: HookedModel) -> None:
    cache = caching(gpt2, "blocks.*.hook_resid_post")
    before = dict(cache)
    assert cache.to("cpu") is cache
    assert all(torch.equal(value, before[name]) for name, value in cache.items())
    # Not there on a machine of the tests, or without any values.
    for device in ("xpu:3", "meta", "nowhere", 3.5):
        with pytest.raises(ModelError, match=r"^device .*; choose cpu, or cuda if there is a GPU$"):
            cache.to(device)  # type: ignore[arg-type]
    assert {value.device.type for value in cache.values()} == {"cpu"}


# Derived values


@pytest.mark.parametrize("kind", TYPES)
def test_derived_values_are_the_captured_ones_to_the_bit(load: Load, kind: str) -> None:
    model = load(kind)
    cache = caching(model, ["*", *(("result", layer) for layer in range(3))])
    leaves = set()
    for name, value in cache.items():
        for way in cache._derivation.ways(name)[1:]:
            few = only(cache, way.needs)
            assert name not in few
            assert torch.equal(few[name], value), (name, way.needs)
            leaves.add(name.split(".", 2)[-1] if name.startswith("blocks") else name)
    stream = {"hook_resid_pre", "hook_resid_post"}
    norms = {f"{ln}.hook_{what}" for ln in ("ln1", "ln_final") for what in ("scale", "normalized")}
    attention = {"attn.hook_pattern", "attn.hook_result"}
    assert leaves >= stream | norms | attention
    if "blocks.0.hook_resid_mid" in cache.names:
        assert leaves >= {"hook_resid_mid", "ln2.hook_scale", "ln2.hook_normalized"}
        assert torch.equal(cache["mlp_in", 1], cache["resid_mid", 1])
    assert ("mlp.hook_post" in leaves) == (kind not in MIXTURES)


def test_ln2_of_a_parallel_block_reads_the_stream_into_the_layer(load: Load) -> None:
    cache = caching(load("gpt_neox"))
    few = only(cache, ["blocks.1.hook_resid_pre"])
    assert torch.equal(few["scale", 1, "ln2"], cache["scale", 1, "ln2"])


def test_the_shortest_way_is_taken_and_nothing_is_kept(gpt2: HookedModel) -> None:
    cache = caching(gpt2, ["blocks.1.hook_resid_pre", "blocks.*.hook_attn_out", "blocks.1.hook_mlp_out"])
    held = list(cache)
    whole = caching(gpt2)
    for name in ("blocks.0.hook_resid_post", "blocks.1.ln2.hook_normalized", "blocks.2.ln1.hook_scale"):
        assert torch.equal(cache[name], whole[name])
    assert list(cache) == held
    # Not across layers: that would be a sum over the whole model.
    with pytest.raises(HookError, match="does not hold blocks.2.hook_resid_post"):
        cache["resid_post", 2]


def test_gradients_flow_through_derived_values(gpt2: HookedModel) -> None:
    logits, cache = gpt2.run_with_cache(some_tokens(), names_filter=[("resid_post", 1), "z1"], grad=True)
    assert logits.requires_grad
    (gradient,) = torch.autograd.grad(cache["result", 1].square().sum(), cache["z", 1])
    assert gradient.abs().max() > 0
    (gradient,) = torch.autograd.grad(cache["normalized", 2, "ln1"].square().sum(), cache["resid_post", 1])
    assert gradient.shape == (2, 16, 64)


def test_values_of_a_model_with_trainable_weights_have_no_graph(tiny_model: TinyModel) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"), dtype=torch.float32).eval()
    cache = caching(HookedModel(plain))
    assert plain.lm_head.weight.requires_grad
    full = cache.get_full_resid_decomposition()
    results = [cache["result", 0], full, cache.logit_lens(), cache.logit_attrs(full, 3)]
    assert not [value for value in results if value.requires_grad]


# The stream taken apart


@pytest.mark.parametrize("kind", TYPES)
def test_parts_add_up_to_the_stream(load: Load, kind: str) -> None:
    model = load(kind)
    cache = caching(model)
    for layer in (0, 1, None):
        stream = cache["resid_post", -1] if layer is None else cache["resid_pre", layer]
        assert_near(cache.decompose_resid(layer).sum(0), stream)
        if kind in SANDWICH:
            continue
        coarse = cache.get_full_resid_decomposition(layer, expand_neurons=False)
        assert_near(coarse.sum(0), stream)
        heads = cache.stack_head_results(layer, incl_remainder=True)
        assert_near(heads.sum(0), stream)
        if kind not in MIXTURES:
            assert_near(cache.get_full_resid_decomposition(layer).sum(0), stream)
            neurons = cache.stack_neuron_results(layer, incl_remainder=True)
            assert_near(neurons.sum(0), stream)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_parts_add_up_to_the_input_of_an_mlp(load: Load, kind: str) -> None:
    model = load(kind)
    cache = caching(model)
    for layer in range(3):
        mid = cache["resid_mid", layer]
        assert_near(cache.decompose_resid(layer, mlp_input=True).sum(0), mid)
        full = cache.get_full_resid_decomposition(layer, mlp_input=True)
        assert_near(full.sum(0), mid)
        normed = cache.get_full_resid_decomposition(layer, mlp_input=True, apply_ln=True)
        gain = model.blocks[layer].ln2.w
        assert_near(normed.sum(0), cache["normalized", layer, "ln2"] * gain)


def test_labels_name_the_parts(gpt2: HookedModel) -> None:
    cache = caching(gpt2)
    layers = ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    stack, labels = cache.decompose_resid(2, return_labels=True)
    assert labels == layers
    assert torch.equal(stack[labels.index("1_attn_out")], cache["attn_out", 1])
    assert cache.decompose_resid(1, True, "attn", return_labels=True)[1] == [
        "embed",
        "pos_embed",
        "0_attn_out",
        "1_attn_out",
    ]
    assert cache.decompose_resid(1, True, "mlp", incl_embeds=False, return_labels=True)[1] == ["0_mlp_out"]
    stack, labels = cache.stack_head_results(2, return_labels=True, incl_remainder=True)
    assert labels == [*(f"L{layer}H{head}" for layer in range(2) for head in range(4)), "remainder"]
    assert torch.equal(stack[labels.index("L1H2")], cache["result", 1][:, :, 2])
    stack, labels = cache.stack_neuron_results(2, neuron_slice=[3, -1], return_labels=True)
    assert labels == ["L0N3", "L0N255", "L1N3", "L1N255"]
    assert torch.equal(stack[1], cache.get_neuron_results(0, -1))
    stack, labels = cache.get_full_resid_decomposition(return_labels=True)
    assert (len(labels), labels[12], labels[-3:]) == (
        12 + 3 * 256 + 3,
        "L0N0",
        ["embed", "pos_embed", "bias"],
    )
    assert len(stack) == len(labels)
    labels = cache.get_full_resid_decomposition(1, expand_neurons=False, return_labels=True)[1]
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3", "0_mlp_out", "embed", "pos_embed", "bias"]


def test_accumulated_resid_is_the_stream(gpt2: HookedModel) -> None:
    cache = caching(gpt2)
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    assert torch.equal(stack[3], cache["resid_mid", 1])
    assert torch.equal(stack[-1], cache["resid_post", -1])
    stack, labels = cache.accumulated_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "1_pre", "1_mid"]
    assert torch.equal(stack[-1], cache["resid_mid", 1])


@pytest.mark.parametrize("pos_slice", [-1, (1, 5), [0, 3], slice(2, None)])
def test_positions_can_be_chosen(gpt2: HookedModel, pos_slice: Any) -> None:
    cache = caching(gpt2)
    where = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice

    def check(method: Callable[..., Tensor], *args: Any, **options: Any) -> None:
        whole = method(*args, **options)[:, :, where]
        assert_near(method(*args, pos_slice=pos_slice, **options), whole)

    check(cache.accumulated_resid, apply_ln=True)
    check(cache.accumulated_resid, 1, apply_ln=True, mlp_input=True)
    check(cache.decompose_resid, apply_ln=True)
    check(cache.stack_head_results, incl_remainder=True, apply_ln=True)
    check(cache.stack_neuron_results, 2, neuron_slice=(0, 3), incl_remainder=True, apply_ln=True)
    check(cache.get_full_resid_decomposition, apply_ln=True)
    check(cache.logit_lens)
    stack, tokens = cache.decompose_resid(), some_tokens()
    assert_near(
        cache.logit_attrs(stack[:, :, where], tokens[:, where], pos_slice=pos_slice),
        cache.logit_attrs(stack, tokens)[:, :, where],
    )


def test_a_cache_of_one_position_has_an_axis_for_it(gpt2: HookedModel) -> None:
    whole, cache = caching(gpt2), caching(gpt2, pos_slice=-1)
    expected = whole.get_full_resid_decomposition(apply_ln=True, pos_slice=-1)
    full = cache.get_full_resid_decomposition(apply_ln=True)
    assert full.shape == (783, 2, 1, 64)
    assert_near(full[:, :, 0], expected)
    assert_near(cache.get_full_resid_decomposition(apply_ln=True, pos_slice=-1), expected)
    assert_near(cache.logit_lens(pos_slice=0), whole.logit_lens(pos_slice=-1))


def test_layer_zero_has_no_heads(gpt2: HookedModel) -> None:
    cache = caching(gpt2)
    assert cache.stack_head_results(0).shape == (0, 2, 16, 64)
    assert cache.stack_neuron_results(0, pos_slice=1).shape == (0, 2, 64)
    stack, labels = cache.stack_head_results(0, return_labels=True, incl_remainder=True)
    assert labels == ["remainder"]
    assert torch.equal(stack[0], cache["resid_pre", 0])


def test_apply_ln_to_stack_keeps_the_sum(load: Load) -> None:
    for kind in ("gpt2", "llama", "gemma2"):
        model = load(kind)
        cache = caching(model)
        for layer, norm in ((0, "ln1"), (2, "ln1")):
            stack = cache.apply_ln_to_stack(cache.decompose_resid(layer), layer)
            # What attention reads, but for the bias of the norm.
            assert_near(stack.sum(0) + model.blocks[layer].ln1.b, cache[f"blocks.{layer}.{norm}.hook_out"])
        normed = model.hf.get_submodule(f"{model.hf.base_model_prefix}.{model.architecture.ln_final}")(
            cache["resid_post", -1]
        ).detach()
        for final in (None, -1):
            stack = cache.apply_ln_to_stack(cache.decompose_resid(), final)
            assert_near(stack.sum(0) + model.ln_final.b, normed)
        one = cache.apply_ln_to_stack(cache.decompose_resid(), batch_slice=1, pos_slice=None)
        assert_near(one.sum(0) + model.ln_final.b, normed[1])
        # One part without an axis for parts, as the notebook on indirect objects has it.
        last = cache.apply_ln_to_stack(cache["resid_post", -1][:, -1], pos_slice=-1)
        assert_near(last + model.ln_final.b, normed[:, -1])


def test_stack_activation(gpt2: HookedModel) -> None:
    cache = caching(gpt2)
    assert cache.stack_activation("pattern").shape == (3, 2, 4, 16, 16)
    assert torch.equal(cache.stack_activation("resid_post", 2)[1], cache["resid_post", 1])
    assert torch.equal(cache.stack_activation("scale", None, "ln2")[2], cache["scale", 2, "ln2"])
    with pytest.raises(HookError, match="no layers before layer 0"):
        cache.stack_activation("q", 0)


# Logits


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in (*SANDWICH, *MIXTURES)])
def test_attributions_and_bias_add_up_to_the_logit(load: Load, kind: str) -> None:
    model = load(kind)
    tokens = some_tokens()
    logits, cache = model.run_with_cache(tokens)
    stack = cache.get_full_resid_decomposition()
    logits_of_parts = cache.logit_attrs(stack, tokens).sum(0) + model.folded_b_U[tokens]
    assert_near(logits_of_parts, logits.gather(-1, tokens[..., None])[..., 0])


def test_attributions_add_up_to_the_logit_before_the_softcap(load: Load) -> None:
    model = load("gemma2")
    logits, cache = model.run_with_cache(some_tokens())
    logit_of_parts = cache.logit_attrs(cache.decompose_resid(), 7).sum(0) + model.folded_b_U[7]
    assert logit_of_parts.abs().max() > 1.5
    assert_near((logit_of_parts / 3.0).tanh() * 3.0, logits[..., 7])


def test_tokens_of_attributions(gpt2: HookedModel) -> None:
    cache = caching(gpt2)
    stack = cache.decompose_resid()
    single = " the"
    token = gpt2.to_single_token(single)
    normed = cache.apply_ln_to_stack(stack)
    expected = normed @ gpt2.W_U[:, token]
    for given in (single, token, torch.tensor(token), [token] * 2, [single] * 2, [[token] * 16] * 2):
        assert_near(cache.logit_attrs(stack, given), expected)
    # One for each row.
    attributions = cache.logit_attrs(stack, [token, 5])
    assert_near(attributions[:, 1], normed[:, 1] @ gpt2.W_U[:, 5])
    last = cache.logit_attrs(stack[:, :, -1], [token, 5], pos_slice=-1)
    assert_near(last, attributions[:, :, -1])
    one = cache.logit_attrs(stack, 5, batch_slice=1)
    assert_near(one, attributions[:, 1])
    difference = cache.logit_attrs(stack, token, incorrect_tokens=[5, 6])
    assert_near(difference, expected - cache.logit_attrs(stack, [5, 6]))
    with pytest.raises(HookError, match=r"tokens have shape \[3\] and the stack has rows and positions"):
        cache.logit_attrs(stack, [1, 2, 3])
    with pytest.raises(TokensError, match="token id 300 is outside of the 300 ids"):
        cache.logit_attrs(stack, 300)
    with pytest.raises(TokensError, match="token id -1 is outside"):
        cache.logit_attrs(stack, -1)
    with pytest.raises(TokensError):
        cache.logit_attrs(stack, "more than one token")
    with pytest.raises(TokensError, match="expected token ids or texts"):
        cache.logit_attrs(stack, 1.5)


@pytest.mark.parametrize("kind", TYPES)
def test_the_last_of_the_logit_lens_is_the_output(load: Load, kind: str) -> None:
    model = load(kind)
    logits, cache = model.run_with_cache(some_tokens())
    lens, labels = cache.logit_lens(return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert_near(lens[-1], logits)
    assert torch.equal(cache.logit_lens(1), lens[:2])


def test_each_of_the_logit_lens_is_the_output_of_a_shorter_model(tiny_model: TinyModel, load: Load) -> None:
    folder = tiny_model("llama")
    lens = caching(load("llama")).logit_lens()
    for n_layers in (1, 2):
        short = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu", n_layers=n_layers)
        assert_near(lens[n_layers], short(some_tokens()))


# Errors


def test_a_value_that_is_not_there_says_what_to_add(gpt2: HookedModel) -> None:
    cache = caching(gpt2, "blocks.0.hook_resid_pre")

    def message(name: Any) -> str:
        with pytest.raises(KeyError) as caught:
            cache[name]
        assert isinstance(caught.value, HookError)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    where = " to names_filter (in a store: to its hooks)"
    assert message(("result", 1)) == (
        "this cache does not hold blocks.1.attn.hook_result; add blocks.1.attn.hook_z, from which it is computed,"
        + where
    )
    assert (
        message(("z", 1)) == f"this cache does not hold blocks.1.attn.hook_z; add blocks.1.attn.hook_z{where}"
    )
    assert message(("resid_mid", 0)) == (
        "this cache does not hold blocks.0.hook_resid_mid; add blocks.0.hook_resid_mid, or blocks.0.hook_attn_out, "
        "from which it is computed," + where
    )
    assert "or blocks.2.hook_resid_post, from which" in message("ln_final.hook_scale")
    assert "layers 0 to 2" in message("blocks.7.hook_resid_post")
    assert "does not rotate" in message("blocks.0.attn.hook_rot_q")
    assert "nearest names" in message("blocks.0.hook_nothing")


def test_missing_values_are_told_all_at_once(gpt2: HookedModel) -> None:
    whole = caching(gpt2)
    cache = only(whole, ["blocks.0.attn.hook_z", "blocks.0.hook_attn_out", "blocks.1.hook_attn_out"])
    where = ", which this cache does not hold; add them to names_filter (in a store: to its hooks)"

    def message(method: Callable[..., Any], *args: Any, **options: Any) -> str:
        with pytest.raises(HookError) as caught:
            method(*args, **options)
        return str(caught.value)

    assert message(cache.decompose_resid, apply_ln=True) == (
        "decompose_resid needs hook_embed, hook_pos_embed, blocks.*.hook_mlp_out, blocks.2.hook_attn_out and "
        "ln_final.hook_scale" + where
    )
    assert message(cache.stack_head_results, 2, incl_remainder=True) == (
        "stack_head_results needs blocks.1.attn.hook_z and blocks.1.hook_resid_post" + where
    )
    assert message(cache.accumulated_resid) == (
        "accumulated_resid needs blocks.*.hook_resid_pre and blocks.2.hook_resid_post" + where
    )
    assert message(cache.stack_activation, "pattern").startswith(
        "stack_activation needs blocks.*.attn.hook_pattern, which"
    )


def test_long_runs_of_layers_are_cut_short(tiny_model: TinyModel) -> None:
    folder = tiny_model("gpt2", n_layer=7)
    model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")
    cache = caching(model, ["blocks.0.hook_mlp_out"])
    with pytest.raises(
        HookError, match=r"needs blocks.1.hook_mlp_out ... blocks.6.hook_mlp_out \(6 layers\), which"
    ):
        cache.stack_activation("mlp_out")


def test_what_needs_weights_says_so(gpt2: HookedModel) -> None:
    whole = caching(gpt2)
    cache = only(whole, list(whole), has_model=False)
    stack = cache.decompose_resid()
    gain = "apply_ln_to_stack, which applies the gain of a norm,"
    calls: list[tuple[str, Callable[[], Any]]] = [
        (gain, lambda: cache.decompose_resid(apply_ln=True)),
        ("blocks.1.attn.hook_result", lambda: cache["result", 1]),
        ("stack_head_results", cache.stack_head_results),
        ("stack_neuron_results", lambda: cache.stack_neuron_results(2)),
        ("get_neuron_results", lambda: cache.get_neuron_results(0)),
        ("get_full_resid_decomposition", cache.get_full_resid_decomposition),
        ("accumulated_resid with apply_ln", lambda: cache.accumulated_resid(apply_ln=True)),
        ("logit_lens", cache.logit_lens),
        ("logit_attrs", lambda: cache.logit_attrs(stack, 5)),
    ]
    for what, call in calls:
        with pytest.raises(ModelError) as caught:
            call()
        assert str(caught.value).startswith(
            f"{what} needs the weights; pass model=HookedModel.from_pretrained(...)"
        )


def test_a_model_without_head_has_no_logit_lens(tiny_model: TinyModel) -> None:
    folder = str(tiny_model("gpt2"))
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu", has_head=False)
    cache = caching(model, return_type=None)
    with pytest.raises(ModelError, match="logit_lens needs the language-model head"):
        cache.logit_lens()
    with pytest.raises(ModelError, match="without its language-model head"):
        cache.logit_attrs(cache.decompose_resid(), 5)


@pytest.mark.parametrize("kind", SANDWICH)
def test_heads_behind_a_norm_are_refused(load: Load, kind: str) -> None:
    cache = caching(load(kind))
    for call in (
        cache.stack_head_results,
        lambda: cache.stack_neuron_results(1),
        lambda: cache.get_neuron_results(1),
        cache.get_full_resid_decomposition,
    ):
        with pytest.raises(HookError, match=f"{kind}: its (heads|neurons) do not write to the residual"):
            call()


def test_neurons_of_a_mixture_are_refused(load: Load) -> None:
    cache = caching(load("mixtral"))
    for call in (
        lambda: cache.stack_neuron_results(1),
        lambda: cache.get_neuron_results(0),
        cache.get_full_resid_decomposition,
    ):
        with pytest.raises(HookError, match="mixture of experts"):
            call()


def test_a_parallel_model_has_no_stream_between(load: Load) -> None:
    cache = caching(load("gptj"))
    for call in (
        lambda: cache.accumulated_resid(incl_mid=True),
        lambda: cache.decompose_resid(1, mlp_input=True),
        lambda: cache.get_full_resid_decomposition(1, mlp_input=True),
        lambda: cache["resid_mid", 0],
    ):
        with pytest.raises(HookError, match="in parallel"):
            call()
    with pytest.raises(HookError, match="share one norm"):
        cache.apply_ln_to_stack(cache.decompose_resid(1), 1, mlp_input=True)


def test_arguments_out_of_range(gpt2: HookedModel) -> None:
    cache = caching(gpt2)
    with pytest.raises(HookError, match="layer is 4; give 0 to 3, which"):
        cache.decompose_resid(4)
    with pytest.raises(HookError, match="layer is -2"):
        cache.accumulated_resid(-2)
    with pytest.raises(HookError, match="mlp_input needs the layer of an MLP, 0 to 2"):
        cache.accumulated_resid(mlp_input=True)
    with pytest.raises(HookError, match="mode is 'both'"):
        cache.decompose_resid(mode="both")  # type: ignore[arg-type]
    with pytest.raises(HookError, match="before layer 0 but the embeddings"):
        cache.decompose_resid(0, incl_embeds=False)
    with pytest.raises(HookError, match="neuron 256 is outside of the 256 neurons"):
        cache.get_neuron_results(0, 256)


# TransformerLens


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_computes_what_transformer_lens_computes(tiny_model: TinyModel, load: Load, kind: str) -> None:
    model = load(kind)
    cache = caching(model)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        theirs = bridge.boot(tiny_model(kind)).run_with_cache(some_tokens())[1]
        stack = cache.decompose_resid()
        ln_final, blocks = model.weights.ln_final, model.weights.blocks
        # The norm whose gain apply_ln_to_stack applies; TransformerLens leaves it to the weights behind it.
        calls: list[tuple[Any, ...]] = [
            ("accumulated_resid", (), {"incl_mid": True}),
            ("accumulated_resid", (), {"apply_ln": True, "pos_slice": -1}),
            ("accumulated_resid", (2,), {"apply_ln": True, "mlp_input": True}, blocks[2].ln2),
            ("decompose_resid", (), {}),
            ("decompose_resid", (1,), {"mode": "attn", "mlp_input": True, "apply_ln": True}, blocks[1].ln2),
            ("decompose_resid", (), {"mode": "mlp", "incl_embeds": False, "pos_slice": (2, 5)}),
            ("stack_head_results", (), {"incl_remainder": True}),
            ("stack_head_results", (2,), {"apply_ln": True, "pos_slice": -1}, blocks[2].ln1),
            ("stack_neuron_results", (2,), {"neuron_slice": (0, 5), "incl_remainder": True}),
            ("get_neuron_results", (1,), {"neuron_slice": [3, 7], "pos_slice": [0, 4]}),
            ("get_full_resid_decomposition", (2,), {"apply_ln": True}, blocks[2].ln1),
            ("get_full_resid_decomposition", (), {"expand_neurons": False, "pos_slice": -1}),
            ("apply_ln_to_stack", (stack,), {}, ln_final),
            ("apply_ln_to_stack", (stack, 1), {"mlp_input": True, "batch_slice": 1}, blocks[1].ln2),
            ("stack_activation", ("z",), {}),
            ("stack_activation", ("scale", 2, "ln2"), {}),
        ]
        for name, args, options, *norm in calls:
            labelled = {"return_labels": True} if name in LABELLED else {}
            ours = getattr(cache, name)(*args, **options, **labelled)
            expected = getattr(theirs, name)(*args, **options, **labelled)
            if labelled:
                assert ours[1] == expected[1], name
                ours, expected = ours[0], expected[0]
            assert_near(ours, expected * norm[0].w if norm else expected, 5e-5)


def test_a_stack_of_other_positions_is_refused(tiny_model: TinyModel) -> None:
    """The scale of all positions would silently be broadcast over a stack of one."""
    model = HookedModel.from_pretrained(str(tiny_model("llama")), device="cpu")
    _, cache = model.run_with_cache(torch.arange(7)[None])
    parts = cache.decompose_resid(pos_slice=-1)
    assert cache.logit_attrs(parts, 5, pos_slice=-1).shape == (len(parts), 1)
    with pytest.raises(HookError, match="give the pos_slice and the batch_slice here"):
        cache.logit_attrs(parts, 5)


def test_what_a_function_changed_is_not_computed_from_what_came_before(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(str(tiny_model("gpt2")), device="cpu")
    tokens = torch.arange(7)[None]

    def zero(value: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(value)

    for name, held, derived in (
        (("result", 1), "*", ("result", 1)),
        (("pattern", 1), "*attn_scores", ("pattern", 1)),
        (("resid_mid", 1), ["*.hook_resid_pre", "*.hook_attn_out"], ("resid_mid", 1)),
        (("scale", 1, "ln1"), "*.hook_resid_*", ("normalized", 1, "ln1")),
        ("ln_final.hook_scale", "*.hook_resid_*", "ln_final.hook_scale"),
        # Not from what comes after it either: the stream out of layer 0, before it was changed into that of layer 1.
        (("resid_pre", 1), "blocks.1.hook_resid_pre", ("resid_post", 0)),
    ):
        function = zero if "scale" not in str(name) else (lambda value, hook: value * 2)
        with model.hooks([(name, function)]):
            _, cache = model.run_with_cache(tokens, names_filter=held)
        with pytest.raises(HookError, match="cannot be computed, since a function was on"):
            cache[derived]
        if name == ("result", 1):
            with pytest.raises(HookError, match="cannot be computed, since a function was on"):
                cache.stack_head_results()
            assert cache["result", 0].shape == (1, 7, 4, 64)  # other layers are as they were


def test_a_cache_takes_only_its_own_model(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(str(tiny_model("gpt2")), device="cpu")
    other = HookedModel.from_pretrained(str(tiny_model("llama")), device="cpu")
    _, cache = model.run_with_cache(torch.arange(7)[None])
    given: Any
    for given, message in (
        (other, "of another model than .*, which has model_type llama and not gpt2"),
        (model.hf, "model is GPT2LMHeadModel; wrap it in HookedModel"),
        ("gpt2", "model is str; wrap it in HookedModel"),
    ):
        with pytest.raises(ModelError, match=message):
            ActivationCache(cache.cache_dict, names=cache.names, cfg=cache.cfg, model=given)

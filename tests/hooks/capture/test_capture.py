"""Hook values of every family against the plain Hugging Face forward."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore.hooks.model import HookedModel
from tests.parity.families import FAMILIES, VARIANTS

TinyModel = Callable[..., Path]
LENGTH = 16
MASK = torch.tensor([[0] * 5 + [1] * 11, [1] * 16])


@pytest.fixture(params=VARIANTS, scope="module")
def folder(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Path:
    """A model of each family, and of each variant."""
    family, config = VARIANTS[request.param]
    return tiny_model(family, **config)


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedModel:
    return load(folder)


def load(folder: Path, **options: Any) -> HookedModel:
    return HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu", **options)


def some_tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(0))


def run(model: HookedModel, hooks: Sequence[str], tokens: Tensor) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    chosen = model.names.select(hooks)
    model.run(tokens, chosen, lambda name, value: values.update({name: value.clone()}))
    assert set(values) == set(chosen)
    return values


def test_the_stream_is_bit_equal_to_hidden_states(model: HookedModel) -> None:
    tokens = some_tokens()
    values = run(model, ["blocks.*.hook_resid_*", "ln_final.hook_normalized"], tokens)
    with torch.no_grad():
        states = model.hf(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(model.cfg.n_layers):
        assert torch.equal(values[f"blocks.{layer}.hook_resid_pre"], states[layer])
    # The last hidden state that transformers returns has the final norm applied.
    for layer in range(model.cfg.n_layers - 1):
        assert torch.equal(values[f"blocks.{layer}.hook_resid_post"], states[layer + 1])


def test_patterns_are_those_of_eager_attention(folder: Path, model: HookedModel) -> None:
    tokens = some_tokens()
    with torch.no_grad():
        eager = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        positions = (MASK.cumsum(-1) - 1).clamp(min=0)
        for mask in (None, MASK):
            given = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
            expected = eager(tokens, output_attentions=True, use_cache=False, **given).attentions
            _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=_inside)
            real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
            for layer, weights in enumerate(expected):
                pattern = cache["pattern", layer].transpose(1, 2)[real]
                torch.testing.assert_close(pattern, weights.transpose(1, 2)[real], atol=2e-6, rtol=1e-4)
                scores = cache["attn_scores", layer].transpose(1, 2)[real]
                torch.testing.assert_close(scores.softmax(-1), pattern, atol=1e-6, rtol=1e-4)


def _inside(name: str) -> bool:
    return name.endswith(("hook_pattern", "hook_attn_scores"))


def test_a_tap_on_attention_changes_no_bit(model: HookedModel) -> None:
    tokens = some_tokens()
    for mask in (None, MASK):
        plain = model(tokens, attention_mask=mask)
        tapped, cache = model.run_with_cache(tokens, attention_mask=mask)
        assert torch.equal(plain, tapped)
        assert cache["pattern", 0].shape == (2, 4, LENGTH, LENGTH)
    with torch.no_grad():
        assert torch.equal(plain, model(tokens, attention_mask=MASK))
        assert torch.equal(model(tokens), model.hf(tokens, use_cache=False).logits)


def test_positions_see_no_later_ones(model: HookedModel) -> None:
    tokens = some_tokens()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 300
    before, after = run(model, ["*"], tokens), run(model, ["*"], changed)
    for name, value in before.items():
        axis = 2 if name.endswith(("hook_pattern", "hook_attn_scores")) else 1
        early = slice(None), *[slice(None)] * (axis - 1), slice(-1)
        # Experts gather tokens of all rows into one product, so sums can be in another order.
        torch.testing.assert_close(value[early], after[name][early], atol=2e-6, rtol=1e-5, msg=name)
    last = model.names.select("blocks.2.hook_resid_post")[0]
    assert not torch.equal(before[last][:, -1], after[last][:, -1])


def test_a_model_loaded_only_as_far_as_needed_gives_the_same_bits(folder: Path, model: HookedModel) -> None:
    tokens = some_tokens()
    whole = run(model, ["blocks.0.*", "blocks.1.*"], tokens)
    short = run(load(folder, n_layers=2), ["blocks.*"], tokens)
    assert whole.keys() == short.keys()
    for name, value in whole.items():
        assert torch.equal(short[name], value), name


def test_every_row_of_a_pattern_is_a_distribution_over_what_it_may_see(model: HookedModel) -> None:
    _, cache = model.run_with_cache(some_tokens(), attention_mask=MASK, names_filter=_inside)
    for layer in range(3):
        pattern = cache["pattern", layer]
        assert (pattern.triu(1) == 0).all()
        assert (pattern[0, :, :, :5] == 0).all()  # padding
        assert (pattern[0, :, :5] == 0).all()
        torch.testing.assert_close(pattern[0, :, 5:].sum(-1), torch.ones(4, 11))
        torch.testing.assert_close(pattern[1].sum(-1), torch.ones(4, 16))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.endswith("-window")])
def test_a_window_hides_what_is_further_back(tiny_model: TinyModel, variant: str) -> None:
    family, config = VARIANTS[variant]
    model = load(tiny_model(family, **config))
    _, cache = model.run_with_cache(some_tokens(), names_filter="blocks.*.attn.hook_pattern")
    widths = [int((cache["pattern", layer][0, 0, -1] > 0).sum()) for layer in range(3)]
    assert 5 in widths
    assert set(widths) <= {5, LENGTH}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "opt", "phi3", "gpt_neox", "mixtral"])
def test_left_padding_leaves_real_positions_as_they_were(tiny_model: TinyModel, family: str) -> None:
    model = load(tiny_model(family))
    tokens = some_tokens()
    _, padded = model.run_with_cache(tokens, attention_mask=MASK)
    _, alone = model.run_with_cache(tokens[:1, 5:])
    for name, value in padded.items():
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            value = value[:, :, 5:, 5:]
        elif "expert_indices" not in name:
            value = value[:, 5:]
        else:
            continue
        torch.testing.assert_close(value[:1], alone[name], atol=2e-5, rtol=1e-4, msg=name)


def test_nothing_after_the_last_hook_runs(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))
    ran: list[str] = []
    for name, module in model.base.named_modules():
        module.register_forward_hook(lambda *_args, name=name: ran.append(name))
    model.run(some_tokens(), ["blocks.1.hook_attn_out"], lambda *_: None)
    assert "layers.1.self_attn.o_proj" in ran
    assert not [name for name in ran if name.startswith(("layers.1.mlp", "layers.2", "norm"))]
    ran.clear()
    model.run_with_cache(some_tokens(), names_filter="blocks.1.hook_attn_out", return_type=None)
    assert not [name for name in ran if name.startswith(("layers.1.mlp", "layers.2", "norm"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_capturing_leaves_nothing_behind(tiny_model: TinyModel, family: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = load(tiny_model(family))
    table = dict(ALL_ATTENTION_FUNCTIONS)
    before = {name: copy.copy(vars(module)) for name, module in model.base.named_modules()}

    def fail(_name: str, _value: Tensor) -> None:
        raise RuntimeError("the sink failed")

    run(model, ["*"], some_tokens())
    with pytest.raises(RuntimeError, match="the sink failed"):
        model.run(some_tokens(), model.names.select("blocks.1.attn.hook_pattern"), fail)
    assert dict(ALL_ATTENTION_FUNCTIONS) == table
    for name, module in model.base.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert vars(module).keys() == before[name].keys(), name


def test_attention_of_another_model_passes_untouched(tiny_model: TinyModel) -> None:
    """Both models use one table of attention functions, and the second runs inside of the first."""
    outer, inner = load(tiny_model("llama")), load(tiny_model("qwen2"))
    tokens = some_tokens()
    expected = run(inner, ["*"], tokens)
    seen: list[str] = []

    def sink(name: str, _value: Tensor) -> None:
        seen.append(name)
        if name == "blocks.1.attn.hook_pattern":
            of_inner = run(inner, ["*"], tokens)
            assert all(torch.equal(of_inner[key], expected[key]) for key in expected)

    model_names = outer.names.select("blocks.*.attn.hook_pattern")
    outer.run(tokens, model_names, sink)
    assert seen == list(model_names)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_values_do_not_depend_on_the_kernel(tiny_model: TinyModel, attention: str) -> None:
    folder, tokens = tiny_model("llama"), some_tokens()
    model = load(folder, attention=attention)
    assert model.attention == attention
    expected = run(load(folder), ["*"], tokens)
    for name, value in run(model, ["*"], tokens).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_bfloat16_patterns_are_computed_in_float32(tiny_model: TinyModel) -> None:
    folder, tokens = tiny_model("llama"), some_tokens()
    model = HookedModel.from_pretrained(str(folder), dtype="bfloat16", device="cpu")
    values = run(model, ["blocks.0.attn.hook_rot_?", "blocks.0.attn.hook_pattern"], tokens)
    query = values["blocks.0.attn.hook_rot_q"].float().transpose(1, 2)
    key = values["blocks.0.attn.hook_rot_k"].float().transpose(1, 2).repeat_interleave(2, dim=1)
    scores = (query @ key.transpose(-1, -2)) / 4
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1).bfloat16()
    pattern = values["blocks.0.attn.hook_pattern"]
    assert pattern.dtype == torch.bfloat16
    torch.testing.assert_close(pattern, expected)

"""Packed rows give what a full forward for every cell gives, in every family that has attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import BY_LEAF, POINTS
from actstore.hooks.naming.names import join, split
from tests.parity.families import VARIANTS

TinyModel = Callable[..., Path]

GRIDS = [
    ("resid_pre", ("layer", "pos")),
    ("resid_mid", ("layer", "pos")),
    ("resid_post", ("layer", "pos")),
    ("attn_out", ("layer", "pos")),
    ("mlp_out", ("layer", "pos")),
    ("ln1.hook_scale", ("layer", "pos")),
    ("q", ("layer", "pos", "head")),
    ("k", ("layer", "pos", "head")),
    ("v", ("layer", "pos", "head")),
    ("z", ("layer", "pos", "head")),
    ("z", ("layer", "head")),
    ("rot_k", ("layer", "head")),
    ("attn_scores", ("layer", "head", "dest_pos")),
    ("pattern", ("layer", "head_index")),
    ("pattern", ("layer", "head_index", "dest_pos", "src_pos")),
]

WHOLE_LIST = ("gpt2", "llama", "gemma2-window", "gpt_neox")
"""Variants in which every kind of hook is tried; in the others the stream, keys and a pattern."""


def prompts() -> tuple[Tensor, Tensor]:
    """Two pairs (clean, corrupted) that differ from different positions on."""
    corrupted = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    clean = corrupted.clone()
    clean[0, 2], clean[1, 5], clean[:, 6] = 7, 9, 11
    return clean, corrupted


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 6]


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_are_whole_rows(tiny_model: TinyModel, variant: str) -> None:
    """With all logits and with those of the last position, in many small waves."""
    family, config = VARIANTS[variant]
    model = HookedModel.from_pretrained(tiny_model(family, **config), dtype="float32", device="cpu")
    clean, corrupted = prompts()
    _, cache = model.run_with_cache(clean, names_filter=[*model.names])
    for hook, axes in GRIDS if variant in WHOLE_LIST else [GRIDS[0], GRIDS[7], GRIDS[13]]:
        if not any(name.endswith((f".{hook}", f"hook_{hook}")) for name in model.names):
            continue
        slow = patching.grid(model, corrupted, cache, difference, hook, axes, engine="whole rows")
        for positions in (None, -1):
            fast = patching.grid(
                model, corrupted, cache, difference, hook, axes, positions=positions, max_tokens=200
            )
            assert fast.engine == "packed rows"
            torch.testing.assert_close(fast.values, slow.values, atol=1e-5, rtol=0, msg=f"{hook} {axes}")
        assert (slow.values - slow.corrupted.view(2, *[1] * len(axes))).abs().max() > 1e-4, hook


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2-window", "gptj", "mixtral", "qwen3"])
def test_every_hook_that_can_be_edited_is_exact(tiny_model: TinyModel, variant: str) -> None:
    """What an edit reaches within its layer is stated hook by hook, and too little would give other numbers."""
    family, config = VARIANTS[variant]
    model = HookedModel.from_pretrained(tiny_model(family, **config), dtype="float32", device="cpu")
    clean, corrupted = prompts()
    _, cache = model.run_with_cache(clean, names_filter=[*model.names])
    leaves = [point.leaf for point in POINTS if point.reach and join(0, point.leaf) in model.names]
    assert set(leaves) == {
        leaf
        for name in model.names
        if name.startswith("blocks.0.") and "expert" not in (leaf := split(name)[1])
    }
    for leaf in leaves:
        axes = ("layer", "pos", "head") if {"head", "kv_head"} & set(BY_LEAF[leaf].axes) else ("layer", "pos")
        slow, fast = (
            patching.grid(model, corrupted, cache, difference, leaf, axes, positions=-1, engine=engine)
            for engine in ("whole rows", "packed rows")
        )
        torch.testing.assert_close(fast.values, slow.values, atol=1e-5, rtol=0, msg=leaf)
        assert (slow.values - slow.corrupted.view(2, *[1] * len(axes))).abs().max() > 1e-4, leaf


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma2-window"])
def test_cells_are_those_of_hooks_on_the_plain_model(tiny_model: TinyModel, variant: str) -> None:
    """Nothing of ours on the other side: PyTorch's hooks on the layers of a Hugging Face model."""
    family, config = VARIANTS[variant]
    folder = tiny_model(family, **config)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    layers = plain.base_model.h if family == "gpt2" else plain.base_model.layers
    clean, corrupted = prompts()
    streams: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _m, _a, out: streams.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in layers
    ]
    with torch.no_grad():
        plain(clean)
    for handle in handles:
        handle.remove()
    expected = torch.zeros(2, len(layers), 9)
    for number, layer in enumerate(layers):
        for position in range(9):

            def edit(
                _module: Any, _args: Any, out: Any, number: int = number, position: int = position
            ) -> Any:
                value = (out[0] if isinstance(out, tuple) else out).clone()
                value[:, position] = streams[number][:, position]
                return (value, *out[1:]) if isinstance(out, tuple) else value

            handle = layer.register_forward_hook(edit)
            with torch.no_grad():
                expected[:, number, position] = difference(plain(corrupted).logits)
            handle.remove()
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    result = patching.grid(model, corrupted, clean, difference, "resid_post")
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0)
    assert result.engine == "packed rows"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_prompts_metrics_and_budgets_give_the_same(tiny_model: TinyModel, data: st.DataObject) -> None:
    model = _llama(tiny_model)
    n_prompts, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    ids = st.lists(st.integers(2, 12), min_size=length, max_size=length)
    clean, corrupted = (
        torch.tensor(data.draw(st.lists(ids, min_size=n_prompts, max_size=n_prompts))) for _ in range(2)
    )
    hook, axes = data.draw(st.sampled_from(GRIDS))
    chosen = data.draw(st.sets(st.integers(-length, length - 1), min_size=1).map(list) | st.none())
    mean = data.draw(st.booleans())

    def metric(logits: Tensor) -> Tensor:
        """Every position that is given counts, each by its place."""
        weights = torch.arange(1, logits.shape[1] + 1)
        values = (logits[..., 3] * weights).sum(1) - logits.logsumexp(-1).mean(1)
        return values.mean() if mean else values

    results = [
        patching.grid(
            model, corrupted, clean, metric, hook, axes, positions=chosen, max_tokens=budget, engine=engine
        )
        for budget, engine in ((data.draw(st.integers(1, 100)), "packed rows"), (64, "whole rows"))
    ]
    torch.testing.assert_close(results[0].values, results[1].values, atol=2e-5, rtol=5e-6)


_MODELS: dict[Path, HookedModel] = {}


def _llama(tiny_model: TinyModel) -> HookedModel:
    folder = tiny_model("llama")
    if folder not in _MODELS:
        _MODELS[folder] = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    return _MODELS[folder]


def test_a_cell_that_changes_nothing_has_exactly_the_metric_of_the_corrupted_run(
    tiny_model: TinyModel,
) -> None:
    model = _llama(tiny_model)
    clean, corrupted = prompts()
    result = patching.grid(model, corrupted[:1], clean[:1], difference)
    unchanged = result.values == result.corrupted
    assert unchanged[:, :2].all()  # the prompts are equal there
    assert unchanged[0, [3, 4, 5, 7, 8]].all()  # before the first layer, only other tokens make a difference
    assert not unchanged[1, 2:].any()
    assert result.n_skipped == 3 * 2 + 5


def test_memory_is_bounded_by_the_tokens(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of a layer has more tokens than the budget, and none of the waves holds more on the way."""
    from actstore.hooks.packing.packed_run import PackedRun

    model = _llama(tiny_model)
    clean, corrupted = prompts()
    calls: list[int] = []
    original = PackedRun.layer

    def counted(self: PackedRun, layer: int, stream: Tensor, *rest: Any) -> Tensor:
        calls.append(len(stream))
        return original(self, layer, stream, *rest)

    monkeypatch.setattr(PackedRun, "layer", counted)
    for budget in (20, 60):
        calls.clear()
        patching.grid(model, corrupted[:1], clean[:1], difference, max_tokens=budget)
        # Beside the cells, a wave has one unpatched row of 9 tokens at most.
        assert max(calls) <= budget + 9
        assert len(calls) > 3


def test_a_model_whose_layers_join_positions_runs_as_whole_rows(tiny_model: TinyModel) -> None:
    """A layer that takes a mean over positions, as no attention does, is noticed by what comes out."""
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    module = plain.base_model.layers[1].mlp
    forward = module.forward
    module.forward = lambda hidden: forward(hidden) + hidden.cumsum(1) / 10
    model = HookedModel(plain, check=False)
    clean, corrupted = prompts()
    result = patching.grid(model, corrupted, clean, difference)
    assert result.engine.startswith("whole rows: unpatched rows ended")
    slow = patching.grid(model, corrupted, clean, difference, engine="whole rows")
    torch.testing.assert_close(result.values, slow.values)
    with pytest.raises(Exception, match="unpatched rows ended"):
        patching.grid(model, corrupted, clean, difference, engine="packed rows")


@pytest.mark.parametrize(
    "hook", ["attn_scores", "pattern", "z", "rot_k", "result", "resid_pre", "ln2.hook_scale"]
)
def test_a_model_in_bfloat16_runs_as_packed_rows(tiny_model: TinyModel, hook: str) -> None:
    """Scores are computed in float32 whatever the model is in. The largest logits are about 2."""
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="bfloat16", device="cpu")
    clean, corrupted = prompts()
    axes = ("layer", "pos")
    fast = patching.grid(model, corrupted, clean, difference, hook, axes, engine="packed rows")
    slow = patching.grid(model, corrupted, clean, difference, hook, axes, engine="whole rows")
    torch.testing.assert_close(fast.values, slow.values, atol=0.06, rtol=0)
    assert (fast.difference.abs() > 0).any()


def test_functions_on_hooks_are_part_of_every_cell(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(tiny_model("gpt2"), dtype="float32", device="cpu")
    clean, corrupted = prompts()
    before = patching.grid(model, corrupted, clean, difference)

    def doubled(value: Tensor, hook: Any) -> Tensor:
        return value * 2

    with model.hooks([("blocks.2.hook_mlp_out", doubled)]):
        during = patching.grid(model, corrupted, clean, difference)
    assert during.engine == "whole rows: there are functions on its hooks"
    assert (during.values - before.values).abs().max() > 1e-4
    with model.hooks(bwd_hooks=[("blocks.2.hook_mlp_out", doubled)]):
        graded = patching.grid(model, corrupted, clean, difference)
    assert graded.engine == during.engine
    torch.testing.assert_close(graded.values, before.values, atol=1e-5, rtol=1e-4)
    assert not graded.values.requires_grad

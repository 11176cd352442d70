"""Live capture on a GPU from a model of a real size: nothing that passes a hook differs from the plain forward."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from actstore.hooks.model import HookedModel
from actstore.store.format.plan import Segment
from tests.benchmarks.measure import interleaved
from tests.gpu import llama, transfer

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SITES = {
    "hook_resid_pre": ("", "input"),
    "hook_resid_post": ("", "output"),
    "attn.hook_q": ("self_attn.q_proj", "output"),
    "attn.hook_z": ("self_attn.o_proj", "input"),
    "hook_attn_out": ("self_attn", "output"),
    "mlp.hook_pre": ("mlp.gate_proj", "output"),
    "mlp.hook_post": ("mlp.down_proj", "input"),
    "hook_mlp_out": ("mlp", "output"),
}
"""By leaf, the module of a Llama layer that has the value, and where."""


@pytest.fixture(scope="module", params=["sdpa", "flash_attention_2"])
def model(request: pytest.FixtureRequest) -> HookedModel:
    if request.param == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    return HookedModel(llama.build(DEVICE, attention=request.param))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return llama.some_tokens(DEVICE)


def plain_hooks(model: HookedModel, layers: list[int], tokens: Tensor) -> dict[str, Tensor]:
    """What PyTorch's own forward hooks see in the same model."""
    values: dict[str, Tensor] = {}

    def register(name: str, module: Any, side: str) -> Any:
        def keep(_module: Any, args: Any, output: Any) -> None:
            value = args[0] if side == "input" else output
            values[name] = (value[0] if isinstance(value, tuple) else value).clone()

        return module.register_forward_hook(keep)

    handles = [
        register(f"blocks.{layer}.{leaf}", model.layers[layer].get_submodule(path), side)
        for layer in layers
        for leaf, (path, side) in SITES.items()
    ]
    try:
        with torch.inference_mode():
            model.base(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return values


def test_values_are_bit_equal_to_those_of_plain_forward_hooks(model: HookedModel, tokens: Tensor) -> None:
    layers = [0, model.cfg.n_layers // 2, model.cfg.n_layers - 1]
    expected = plain_hooks(model, layers, tokens)
    _, cache = model.run_with_cache(tokens, names_filter=list(expected), return_type=None)
    assert set(cache.keys()) == set(expected)
    for name, value in expected.items():
        assert torch.equal(cache[name].reshape(value.shape), value), name


def test_a_tap_on_attention_changes_no_bit_of_the_logits(model: HookedModel, tokens: Tensor) -> None:
    names = ["blocks.0.attn.hook_pattern", f"blocks.{model.cfg.n_layers - 1}.attn.hook_attn_scores"]
    with torch.inference_mode():
        without = model.hf(input_ids=tokens, use_cache=False).logits
    tapped, cache = model.run_with_cache(tokens, names_filter=names)
    assert set(cache.keys()) == set(names)
    assert torch.equal(tapped, without)


def test_patterns_are_those_of_eager_attention(model: HookedModel) -> None:
    tokens = llama.some_tokens(DEVICE, batch=2, context=256)
    name = "blocks.0.attn.hook_pattern"
    _, cache = model.run_with_cache(tokens, names_filter=name, return_type=None)
    # Only layer 0 is given the same bits by both.
    expected = eager_patterns(model, tokens)[0]
    assert cache[name].dtype == model.dtype
    torch.testing.assert_close(cache[name], expected, rtol=0.03, atol=1e-3)


def test_patterns_in_float32_are_those_of_eager_attention() -> None:
    model = HookedModel(llama.build(DEVICE, torch.float32))
    tokens = llama.some_tokens(DEVICE, batch=2, context=256)
    _, cache = model.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern", return_type=None)
    for layer, expected in enumerate(eager_patterns(model, tokens)):
        torch.testing.assert_close(cache["pattern", layer], expected, rtol=1e-3, atol=1e-5)


def eager_patterns(model: HookedModel, tokens: Tensor) -> tuple[Tensor, ...]:
    """Of all layers, from the same weights."""
    before = model.attention
    model.hf.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            found = model.base(input_ids=tokens, use_cache=False, output_attentions=True).attentions
    finally:
        model.hf.set_attn_implementation(before)
    return tuple(found)


def test_values_arrive_in_host_memory_as_they_are(model: HookedModel, tokens: Tensor) -> None:
    hooks = transfer.residual_hooks(model)
    n_batches = 3
    to = transfer.buffers(model, hooks, tokens, n_batches)
    transfer.fill(model, hooks, tokens, to, n_batches)
    _, cache = model.run_with_cache(tokens, names_filter=hooks, return_type=None)
    n_sequences = n_batches * len(tokens)
    rows = to.rows(Segment(0, 0, n_sequences))
    for hook in hooks:
        stored = torch.from_numpy(rows[hook]).view(model.dtype)
        expected = cache[hook].cpu().repeat(n_batches, 1, 1)
        assert torch.equal(stored[:n_sequences].reshape(expected.shape), expected)


def test_the_forward_keeps_its_rate_while_values_travel(model: HookedModel, tokens: Tensor) -> None:
    rates = interleaved(transfer.sides(model, tokens, n_batches=8))
    with_copies, bare = rates["copies"].median, rates["bare"].median
    assert with_copies >= 0.95 * bare

"""Values and gradients that TransformerLens' caching arguments keep."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actstore.errors import HookError
from actstore.hooks.cache.slicing import Slice
from actstore.hooks.model import HookedModel
from tests.parity.bridge import boot

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))
NAMES = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z"]


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> HookedModel:
    return HookedModel.from_pretrained(str(tiny_model("llama")), dtype="float32", device="cpu")


def test_incl_bwd_is_that_of_transformerlens(tiny_model: TinyModel, llama: HookedModel) -> None:
    loss, cache = llama.run_with_cache(TOKENS, return_type="loss", names_filter=NAMES, incl_bwd=True)
    their_loss, theirs = boot(tiny_model("llama")).run_with_cache(
        TOKENS, return_type="loss", names_filter=NAMES, incl_bwd=True
    )
    torch.testing.assert_close(loss, their_loss)
    assert list(cache) == [*NAMES, *(f"{name}_grad" for name in NAMES)]
    for name in cache:
        torch.testing.assert_close(cache[name], theirs[name], atol=1e-6, rtol=1e-3)
        assert not cache[name].requires_grad
    assert "blocks.1.attn.hook_z_grad" in cache
    assert "blocks.0.attn.hook_z_grad" not in cache
    with pytest.raises(HookError, match="does not hold blocks.0.attn.hook_z_grad; run_with_cache"):
        cache["blocks.0.attn.hook_z_grad"]
    _, part = llama.run_with_cache(
        TOKENS[:1], "loss", names_filter=NAMES, incl_bwd=True, pos_slice=-1, remove_batch_dim=True
    )
    assert part["blocks.1.attn.hook_z_grad"].shape == (1, 4, 16)
    assert part["blocks.1.attn.hook_pattern_grad"].shape == (4, 1, 10)
    with pytest.raises(HookError, match="needs an output of one number"):
        llama.run_with_cache(TOKENS, incl_bwd=True)


def test_all_hooks_have_gradients(llama: HookedModel) -> None:
    _, cache = llama.run_with_cache(TOKENS, "loss", incl_bwd=True)
    assert sum(name.endswith("_grad") for name in cache) == len(cache) / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"pos_slice": -1}, {"pos_slice": Slice(-1)}, {"remove_batch_dim": True, "pos_slice": (2, 5)}],
)
def test_caching_hooks_keep_what_run_with_cache_keeps(llama: HookedModel, options: dict[str, Any]) -> None:
    tokens = TOKENS[:1]
    cache, fwd, bwd = llama.get_caching_hooks(NAMES, incl_bwd=True, **options)
    loss = llama.run_with_hooks(tokens, "loss", fwd_hooks=fwd, bwd_hooks=bwd)
    assert cache.keys() == set(NAMES)
    loss.backward()
    _, expected = llama.run_with_cache(tokens, "loss", names_filter=NAMES, incl_bwd=True, **options)
    assert cache.keys() == set(expected)
    for name in expected:
        torch.testing.assert_close(cache[name], expected[name])
    own: dict[str, Any] = {}
    assert llama.add_caching_hooks(NAMES, cache=own, **options) is own
    try:
        llama(tokens)
        assert own.keys() == set(NAMES)
    finally:
        llama.reset_hooks()
    torch.testing.assert_close(own["hook_embed"], expected["hook_embed"])

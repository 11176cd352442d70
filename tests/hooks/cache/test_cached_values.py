"""Caches that are saved, copied and completed."""

import copy
import pickle
from pathlib import Path

import pytest
import torch

from actstore.demo import MODEL_PATH
from actstore.errors import HookError, ModelError
from actstore.hooks.cache.slicing import Slice
from actstore.hooks.model import HookedModel

TEXT = "My lord, I came to see your father"


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel.from_pretrained(MODEL_PATH)


def test_a_saved_cache_has_no_model(model: HookedModel, tmp_path: Path) -> None:
    _, cache = model.run_with_cache(TEXT, names_filter=["blocks.*.attn.hook_z", "hook_embed"])
    torch.save(cache, tmp_path / "cache.pt")
    n_values = sum(value.nbytes for value in cache.values())
    assert (tmp_path / "cache.pt").stat().st_size < n_values + 50_000
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert list(loaded) == list(cache)
    assert torch.equal(loaded["z", -1], cache["z", -1])
    assert loaded.kind == "activations"
    with pytest.raises(ModelError, match=r"needs the weights; .* or set it as cache.model"):
        loaded.stack_head_results()
    loaded.model = model
    assert torch.equal(loaded.stack_head_results(), cache.stack_head_results())


def test_what_was_edited_is_still_known(model: HookedModel) -> None:
    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"]
    with model.hooks([(("z", 1), lambda value, hook: value * 2)]):
        _, cache = model.run_with_cache(TEXT, names_filter=names)
    for same in (pickle.loads(pickle.dumps(cache)), copy.copy(cache), copy.deepcopy(cache)):
        with pytest.raises(HookError, match="since a function was on blocks.1.attn.hook_z"):
            _ = same["resid_mid", 1]


def test_copies(model: HookedModel) -> None:
    _, cache = model.run_with_cache(TEXT)
    shallow, deep = copy.copy(cache), copy.deepcopy(cache)
    assert shallow.model is deep.model is model
    assert shallow["z", 1] is cache["z", 1]
    cache["z", 1].zero_()
    assert not shallow["z", 1].any()
    assert deep["z", 1].any()
    shallow.remove_batch_dim()
    assert cache.has_batch_dim


def test_head_results_are_put_into_the_cache(model: HookedModel) -> None:
    _, cache = model.run_with_cache(TEXT)
    stack = cache.stack_head_results()
    assert "blocks.1.attn.hook_result" not in cache
    cache.compute_head_results()
    assert torch.equal(torch.cat([value.movedim(2, 0) for value in cache.stack_activation("result")]), stack)
    assert "blocks.3.attn.hook_result" in cache
    assert torch.equal(cache.stack_head_results(), stack)
    _, streams = model.run_with_cache(TEXT, names_filter="blocks.*.hook_resid_post")
    with pytest.raises(HookError, match=r"compute_head_results needs blocks.\*.attn.hook_z"):
        streams.compute_head_results()


def test_gradients_are_turned_off(model: HookedModel) -> None:
    _, cache = model.run_with_cache(TEXT, names_filter="hook_embed")
    assert torch.is_grad_enabled()
    try:
        cache.toggle_autodiff(mode=False)
        assert not torch.is_grad_enabled()
    finally:
        cache.toggle_autodiff(mode=True)
    assert torch.is_grad_enabled()


def test_the_last_position_of_each_row_goes_through_the_final_norm(model: HookedModel) -> None:
    """[batch, d_model], as notebooks have it for the answers to a batch of prompts."""
    tokens = model.to_tokens([TEXT, "My lord, I came to see your mother"])
    logits, cache = model.run_with_cache(tokens)
    final = cache["resid_post", -1][:, -1]
    scaled = cache.apply_ln_to_stack(final, layer=-1, pos_slice=-1)
    torch.testing.assert_close(scaled @ model.W_U + model.folded_b_U, logits[:, -1], atol=1e-3, rtol=1e-3)
    for rows in (1, [1], (1, 2)):
        chosen = cache.apply_ln_to_stack(final, layer=-1, pos_slice=-1, batch_slice=rows)
        assert torch.equal(chosen, Slice(rows).apply(scaled))

"""Stores of every kind of hook: the same values that a live cache has, and the same cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import actstore
from actstore.errors import HookError, ModelError
from actstore.extraction.planning.stored_hooks import stored_hooks
from actstore.hooks.loading.pretrained import load_config
from tests.parity.families import FAMILIES

Fields = dict[str, Any]
TinyModel = Callable[..., Path]


def extract(fields: Fields, **changes: Any) -> actstore.Store:
    fields = fields | {"max_tokens": 16 * 32, "batch_size": 8} | changes
    del fields["segment_size"]
    actstore.extract(actstore.plan(**fields))
    return actstore.open(fields["out"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_of_everything_equals_a_live_cache(
    fields: Fields, tiny_model: TinyModel, family: str
) -> None:
    folder = str(tiny_model(family))
    store = extract(fields, model=folder, hooks=["*"])
    model = actstore.HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    # The same rows in a batch of the same shape.
    tokens = torch.from_numpy(store.tokens[:8]).long()
    _, live = model.run_with_cache(tokens)
    stored = store.cache(slice(0, 8), model=model)
    for name, value in live.items():
        if not name.endswith("hook_expert_indices"):
            assert torch.equal(stored[name], value), name
    # The stream into a layer is kept once, as the stream out of the layer before.
    assert "blocks.1.hook_resid_pre" not in store.hooks
    assert "blocks.0.hook_resid_pre" in store.hooks


def test_a_cache_of_a_store_has_the_methods_of_a_live_one(fields: Fields) -> None:
    hooks = ["hook_embed", "*.hook_attn_out", "*.hook_mlp_out", "*.attn.hook_z", "*.hook_resid_post"]
    store = extract(fields, hooks=hooks)
    model = actstore.HookedModel.from_pretrained(fields["model"], device="cpu")
    _, live = model.run_with_cache(torch.from_numpy(store.tokens[:8]).long())
    # hook_resid_pre of the first layer is the embedding, and nothing else is missing.
    with pytest.raises(HookError, match="add blocks.0.hook_resid_pre"):
        _ = store.cache([0])["resid_pre", 0]
    cache = store.cache([3, 5], model=model)
    assert type(cache) is type(live)
    for ours, theirs in (
        (cache.decompose_resid(), live.decompose_resid()),
        (cache.stack_head_results(), live.stack_head_results()),
        (cache.logit_attrs(cache.decompose_resid(), 7), live.logit_attrs(live.decompose_resid(), 7)),
        (cache["normalized", 1, "ln2"][None], live["normalized", 1, "ln2"][None]),
    ):
        torch.testing.assert_close(ours, theirs[:, [3, 5]], atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="needs the weights; pass model="):
        store.cache([0]).stack_head_results()
    only = store.cache(3, names_filter="*.hook_z")
    assert set(only) == {f"blocks.{layer}.attn.hook_z" for layer in range(3)}
    assert only["z", 0].shape == (1, 32, 4, 16)


def test_a_store_takes_every_spelling(fields: Fields) -> None:
    store = extract(fields, hooks=["blocks.*.hook_out", "k0"])
    assert store.hooks == ("blocks.0.attn.hook_k", *(f"blocks.{layer}.hook_resid_post" for layer in range(3)))
    for spelling in (("resid_post", -2), "blocks.1.hook_out", "model.layers.1", "blocks.2.hook_in"):
        assert store[spelling].hook == "blocks.1.hook_resid_post"
        assert spelling in store
    assert store["k0"].shape == (16, 32, 2, 16)
    assert store["k0"].axes == ("sequence", "position", "kv_head", "d_head")


def test_positions_come_before_heads_in_a_store(fields: Fields) -> None:
    store = extract(fields, hooks="blocks.1.attn.hook_pattern")
    acts = store["pattern", 1]
    assert acts.shape == (16, 32, 4, 32)
    assert acts.axes == ("sequence", "position", "head", "source_position")
    torch.testing.assert_close(acts[:].sum(-1), torch.ones(16, 32, 4))
    assert store.cache([0, 1])["pattern", 1].shape == (2, 4, 32, 32)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (["blocks.0.attn.hook_result"], "cannot be stored: .* store attn.hook_z"),
        (["blocks.0.hook_mlp_in"], "cannot be stored: it equals hook_resid_mid"),
        (["blocks.0.mlp.hook_expert_indices"], "does not exist in this model: .* no experts"),
        (["blocks.0.hook_q_input"], "cannot be stored: it is a copy of hook_resid_pre"),
    ],
)
def test_what_a_store_cannot_hold_is_refused_with_the_reason(
    tiny_model: TinyModel, hooks: list[str], message: str
) -> None:
    with pytest.raises(HookError, match=message):
        stored_hooks(load_config(str(tiny_model("llama"))), hooks, 32)


def test_experts(tiny_model: TinyModel) -> None:
    config = load_config(str(tiny_model("mixtral")))
    (array,) = stored_hooks(config, ["blocks.0.mlp.hook_expert*"], 32)
    assert (array.name, array.shape, array.axes) == ("blocks.0.mlp.hook_expert_weights", (4,), ("expert",))
    with pytest.raises(HookError, match="cannot be stored: it holds integers"):
        stored_hooks(config, ["blocks.0.mlp.hook_expert_indices"], 32)

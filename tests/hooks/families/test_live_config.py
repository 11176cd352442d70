"""What may be set in the ``cfg`` of a model."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actstore.demo import MODEL_PATH
from actstore.errors import HookError, ModelError
from actstore.hooks.capture.functions import selected
from actstore.hooks.model import HookedModel


@pytest.fixture
def model() -> HookedModel:
    return HookedModel.from_pretrained(MODEL_PATH)


def test_the_bos_token_by_default(model: HookedModel) -> None:
    with_bos = model.to_tokens("My lord")
    model.cfg.default_prepend_bos = False
    assert torch.equal(model.to_tokens("My lord"), with_bos[:, 1:])
    assert model.to_str_tokens("My lord") == ["My", " lord"]
    assert model.get_token_position(" lord", "My lord") == 1
    assert model("My lord").shape[1] == 2
    assert torch.equal(model.to_tokens("My lord", prepend_bos=True), with_bos)
    with pytest.raises(ModelError, match="default_prepend_bos is 'no'; choose True or False"):
        model.cfg.default_prepend_bos = "no"  # type: ignore[assignment]


def test_what_the_model_is_cannot_be_set(model: HookedModel) -> None:
    model.cfg.n_ctx = model.cfg.n_ctx  # type: ignore[misc]
    with pytest.raises(ModelError, match="cfg.n_ctx cannot be set, since cfg says what the model is"):
        model.cfg.n_ctx = 7  # type: ignore[misc]
    with pytest.raises(ModelError, match="cfg.use_nothing cannot be set"):
        model.cfg.use_nothing = True


def test_copies_for_each_head_are_turned_on(model: HookedModel, tiny_model: Callable[..., Path]) -> None:
    """For functions of names, whether by the field or by the method, and with SAEs, too."""

    def queried() -> tuple[str, ...]:
        return selected(model.names, lambda name: name.startswith("blocks.1.") and "hook_q" in name)

    both = ("blocks.1.hook_q_input", "blocks.1.attn.hook_q")
    assert queried() == both[1:]
    model.cfg.use_split_qkv_input = True
    assert queried() == both
    with model.saes(Halves()):
        assert queried() == both
    model.set_use_split_qkv_input(False)
    assert queried() == both[1:]
    assert pickle.loads(pickle.dumps(model.names)).switched_on() == frozenset()
    shared = HookedModel.from_pretrained(tiny_model("llama", num_key_value_heads=2))
    shared.set_use_split_qkv_input(True)
    with pytest.raises(
        HookError, match="use_attn_in turns on hook_attn_in, which does not exist here: heads"
    ):
        shared.set_use_attn_in(True)
    assert not shared.cfg.use_attn_in


class Halves:
    """Something like an SAE."""

    cfg = SimpleNamespace(hook_name=("resid_post", 1))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.relu(), (-x).relu()], -1)

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        positive, negative = feature_acts.chunk(2, -1)
        return (positive - negative) / 2


def test_dtypes_are_those_of_torch(model: HookedModel) -> None:
    assert model.cfg.dtype == torch.float32
    assert torch.float32 == model.cfg.dtype
    assert pickle.loads(pickle.dumps(model.cfg)).dtype is torch.float32


def test_a_cache_of_transformerlens_reads_it(model: HookedModel) -> None:
    """Notebooks put gradients that functions have kept into TransformerLens' own class, with this model."""
    from transformer_lens import ActivationCache

    _, cache = model.run_with_cache("My lord, I came", "loss", incl_bwd=True)
    for suffix in ("", "_grad"):
        kept = {name.removesuffix(suffix): value for name, value in cache.items() if name.endswith(suffix)}
        parts = ActivationCache(kept, model).decompose_resid(layer=-1)
        names = [
            f"blocks.{layer}.hook_{end}"
            for layer in range(model.cfg.n_layers)
            for end in ("attn_out", "mlp_out")
        ]
        expected = torch.stack(
            [cache[f"{name}{suffix}"] for name in ("hook_embed", "hook_pos_embed", *names)]
        )
        assert torch.equal(parts, expected)

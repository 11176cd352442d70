"""What may be set in the ``cfg`` of a model."""

import pickle

import pytest
import torch

from actstore.demo import MODEL_PATH
from actstore.errors import HookError, ModelError
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import BY_LEAF


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
    for flag, leaf in (("use_split_qkv_input", "hook_q_input"), ("use_attn_in", "hook_attn_in")):
        setattr(model.cfg, flag, False)
        if leaf not in BY_LEAF:
            with pytest.raises(HookError, match=f"{flag} turns on {leaf}, which is not offered"):
                setattr(model.cfg, flag, True)


def test_dtypes_are_those_of_torch(model: HookedModel) -> None:
    assert model.cfg.dtype == torch.float32
    assert torch.float32 == model.cfg.dtype
    assert pickle.loads(pickle.dumps(model.cfg)).dtype is torch.float32

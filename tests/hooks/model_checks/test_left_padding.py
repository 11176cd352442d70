"""Padding in front of a row: ignored by models that attend, refused where it would enter a state."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from actstore.errors import TokensError
from actstore.hooks.model import HookedModel
from tests.hooks.causal_types import tiny_config

ROW = torch.tensor([[5, 60, 7, 80, 9]])
PADDED = torch.tensor([[0, 0, 0, 5, 60, 7, 80, 9]])
MASK = (torch.arange(8) >= 3).long()[None]


def model(model_type: str) -> HookedModel:
    torch.manual_seed(0)
    return HookedModel(AutoModelForCausalLM.from_config(tiny_config(model_type)).eval())


@pytest.mark.parametrize("model_type", ["rwkv", "xlstm"])
def test_models_that_take_padding_into_their_state_refuse_it_in_front(model_type: str) -> None:
    recurrent = model(model_type)
    with pytest.raises(TokensError, match="computes with padding in front of a row"):
        recurrent(PADDED, attention_mask=MASK)
    right = recurrent(PADDED.roll(-3, 1), attention_mask=MASK.flip(1))
    torch.testing.assert_close(right[:, :5], recurrent(ROW))


@pytest.mark.parametrize("model_type", ["olmo2", "smollm3", "mamba"])
def test_padding_in_front_changes_nothing_elsewhere(model_type: str) -> None:
    other = model(model_type)
    torch.testing.assert_close(other(PADDED, attention_mask=MASK)[:, 3:], other(ROW), rtol=1e-4, atol=1e-5)

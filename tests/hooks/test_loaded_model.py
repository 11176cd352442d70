"""A model and its tokenizer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actstore.demo import MODEL_PATH
from actstore.errors import TokensError
from actstore.hooks.model import HookedModel


def test_another_tokenizer() -> None:
    text = "My lord, I came"
    expected = HookedModel.from_pretrained(MODEL_PATH).to_tokens(text)
    model = HookedModel(AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval())
    with pytest.raises(TokensError, match="without a tokenizer"):
        model.to_tokens(text)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model.set_tokenizer(tokenizer)
    assert model.tokenizer is tokenizer
    assert torch.equal(model.to_tokens(text), expected)
    assert torch.equal(model(text), model(expected))
    model.cfg.default_prepend_bos = False
    model.set_tokenizer(AutoTokenizer.from_pretrained(MODEL_PATH), default_padding_side="left")
    assert torch.equal(model.to_tokens(text), expected[:, 1:])
    assert model.to_tokens(["My", text])[0, -1] == model.to_single_token("My")

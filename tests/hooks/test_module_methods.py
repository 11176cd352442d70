"""A hooked model used like a module of PyTorch."""

import pytest
import torch

from actstore.demo import MODEL_PATH
from actstore.errors import ModelError
from actstore.hooks.model import HookedModel
from tests.hooks.test_model import TOKENS, TinyModel, load
from tests.parity.bridge import boot


def test_to_another_dtype(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))
    assert model.cfg.dtype == torch.float32
    half = model.to(torch.bfloat16)
    assert half is model
    assert model.cfg.dtype == model.dtype == model(TOKENS).dtype == torch.bfloat16
    assert torch.zeros(1, device=model.cfg.device, dtype=model.cfg.dtype).dtype == torch.bfloat16
    assert model.to("cpu", print_details=False).cpu() is model
    assert model.cfg.device == "cpu"
    with pytest.raises(ModelError, match="'nowhere' is not known"):
        model.to("nowhere")


def test_it_is_in_evaluation_mode(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))
    assert model.eval() is model.train(False) is model
    assert not model.training
    with pytest.raises(ModelError, match="hooks are those of evaluation mode"):
        model.train()


def test_parameters_are_those_of_the_model_itself(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gpt2"))
    assert list(model.parameters()) == list(model.hf.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in model.hf.named_parameters()]
    assert dict(model.named_modules()) == dict(model.hf.named_modules())
    model.requires_grad_(True)
    loss = model(TOKENS, return_type="loss", grad=True)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_names_of_a_module_and_of_the_bridge() -> None:
    ours, theirs = HookedModel.from_pretrained(MODEL_PATH), boot(MODEL_PATH)
    assert type(ours.original_model) is type(theirs.original_model)
    tokens = ours.to_tokens("My lord, I came")
    assert torch.equal(ours.forward(tokens, return_type="loss"), ours(tokens, "loss"))
    assert ours.cfg.d_vocab_out == theirs.cfg.d_vocab_out == ours(tokens).shape[-1]


def test_weights_come_back(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gpt2"))
    logits, weights = model(TOKENS), {name: weight.clone() for name, weight in model.state_dict().items()}
    model.blocks[1].mlp.W_in[:] = 0
    assert not torch.equal(model(TOKENS), logits)
    model.load_state_dict(weights)
    assert torch.equal(model(TOKENS), logits)


def test_weights_under_transformerlens_names() -> None:
    ours, theirs = HookedModel.from_pretrained(MODEL_PATH).tl_parameters(), boot(MODEL_PATH).tl_parameters()
    common = ours.keys() & theirs.keys()
    assert {
        "embed.W_E",
        "pos_embed.W_pos",
        "unembed.W_U",
        "blocks.3.attn.W_Q",
        "blocks.0.mlp.b_out",
    } <= common
    assert ours.keys() <= theirs.keys()
    for name in common:
        torch.testing.assert_close(ours[name], theirs[name].detach().reshape(ours[name].shape), msg=name)

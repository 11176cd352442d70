"""The logit lens against what the model itself makes of a residual stream."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import actstore
from actstore.analysis import logit_lens
from actstore.analysis.describing import logit_lens as module
from actstore.errors import JobError


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma"])
def folder(request: Any, tiny_model: Any) -> Path:
    """LayerNorm with a bias; RMSNorm; RMSNorm whose gain is 1 + weight."""
    folder: Path = tiny_model(request.param)
    return folder


def changes(folder: Path, directions: torch.Tensor) -> torch.Tensor:
    """What the final norm and the head of Hugging Face make of directions, less what they make of the zero vector.

    A norm of a vector that is long is linear in it but for its length, which is that of the centred one.
    """
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    base = hf.base_model
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    with torch.no_grad():
        changed: torch.Tensor = hf.lm_head(norm(directions * 1e4)) - hf.lm_head(norm(directions * 0))
    return changed


def test_tokens_are_those_that_the_model_makes_likely(folder: Path) -> None:
    model = actstore.HookedModel.from_pretrained(str(folder))
    directions = torch.randn(20, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    assert model.ln_final.w.std() > 0.01  # else the gain would not matter
    lens = logit_lens(directions, model, k=7)
    theirs = changes(folder, directions)
    np.testing.assert_array_equal(lens.top_tokens, theirs.topk(7).indices.numpy())
    np.testing.assert_array_equal(lens.bottom_tokens, (-theirs).topk(7).indices.numpy())
    # Logits are in proportion to the model's.
    ratios = theirs.gather(1, torch.from_numpy(lens.top_tokens)).numpy() / lens.top_logits
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[:, :1], ratios.shape), rtol=1e-3)
    assert lens.text(3)[0] == model.tokenizer.decode([int(lens.top_tokens[3, 0])])
    assert lens.text(3, bottom=True)[-1] == model.tokenizer.decode([int(lens.bottom_tokens[3, -1])])


def test_directions_of_a_decoder_and_a_plain_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 80)
    generator = torch.Generator().manual_seed(1)
    decoder, embedding = torch.randn(9, 6, generator=generator), torch.randn(6, 40, generator=generator)
    logits = decoder @ embedding
    linear = torch.nn.Linear(9, 6)
    linear.weight.data = decoder.T.clone()
    for of in (decoder, decoder.numpy(), SimpleNamespace(W_dec=decoder), SimpleNamespace(decoder=linear)):
        lens = logit_lens(of, embedding, k=4)
        np.testing.assert_array_equal(lens.top_tokens, logits.topk(4).indices.numpy())
        np.testing.assert_allclose(lens.bottom_logits, -(-logits).topk(4).values.numpy(), rtol=1e-5)
    assert len(logit_lens(decoder[0], embedding.numpy(), k=1)) == 1


def test_equal_logits_are_in_the_order_of_their_ids() -> None:
    embedding = torch.tensor([[1.0, 3, 1, 3, 2, 3, 1]])
    lens = logit_lens(torch.ones(1, 1), embedding, k=4)
    assert lens.top_tokens.tolist() == [[1, 3, 5, 4]]
    assert lens.bottom_tokens.tolist() == [[0, 2, 6, 4]]


@pytest.mark.parametrize(
    ("of", "model", "k", "says"),
    [
        (torch.ones(2, 5), torch.ones(4, 9), 2, "directions are [2, 5]"),
        (torch.ones(2, 4), torch.ones(4, 9), 10, "it must be 1 to 9"),
        (torch.ones(2, 4), torch.ones(4), 1, "give a HookedModel, or W_U"),
        (torch.full((2, 4), np.nan), torch.ones(4, 9), 1, "holds NaN or infinity"),
        (["a"], torch.ones(4, 9), 1, "or an SAE"),
    ],
    ids=["width", "k", "model", "nan", "text"],
)
def test_arguments_that_are_wrong(of: Any, model: Any, k: int, says: str) -> None:
    with pytest.raises(JobError, match=re.escape(says)):
        logit_lens(of, model, k)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(JobError, match="give a model, or tokenizer="):
        logit_lens(torch.ones(1, 1), torch.ones(1, 3), 1).text(0)

"""A tokenizer that is set to pad on the left, as notebooks set it before they read the last position."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
TEXTS = ["To be, or not to be: that is the question", "To be"]


def load(folder: Path, **options: Any) -> HookedModel:
    return HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu", **options)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("pad", ["bos", "eos", None])
def test_the_last_position_is_that_of_each_text(
    tiny_model: TinyModel, family: str, prepend_bos: bool, pad: str | None
) -> None:
    """Text, ids, ids in a cache of keys, and generation: padding is masked, even where it is the BOS token."""
    model = load(tiny_model(family), prepend_bos=prepend_bos)
    model.tokenizer.pad_token = None if pad is None else getattr(model.tokenizer, f"{pad}_token")
    alone = torch.stack([model(text)[0, -1] for text in TEXTS])
    assert model.tokenizer.padding_side == "right"
    assert not torch.allclose(model(TEXTS)[:, -1], alone, atol=0.01)
    model.tokenizer.padding_side = "left"
    tokens = model.to_tokens(TEXTS)
    assert torch.equal(tokens[:, -1], torch.stack([model.to_tokens(text)[0, -1] for text in TEXTS]))
    torch.testing.assert_close(model(TEXTS)[:, -1], alone, atol=1e-4, rtol=1e-4)
    logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(logits[:, -1], alone, atol=1e-4, rtol=1e-4)
    expected = model.run_with_cache(TEXTS[1])[1]["resid_post", -1][0, -1]
    torch.testing.assert_close(cache["resid_post", -1][1, -1], expected, atol=1e-4, rtol=1e-4)
    ends = [model.generate(model.to_tokens(text), 3, False, do_sample=False)[0, -3:] for text in TEXTS]
    together = model.generate(tokens, 3, False, do_sample=False)[:, -3:]
    assert torch.equal(together, torch.stack(ends))


def test_the_side_of_one_call(tiny_model: TinyModel) -> None:
    """Ids that a call says are padded on the left, while the tokenizer pads on the right."""
    model = load(tiny_model("llama"))
    model.tokenizer.pad_token = model.tokenizer.bos_token
    tokens = model.to_tokens(TEXTS, padding_side="left")
    alone = torch.stack([model(text)[0, -1] for text in TEXTS])
    torch.testing.assert_close(model(tokens, padding_side="left")[:, -1], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(tokens)[:, -1], alone, atol=0.01)
    stream = model.run_with_cache(tokens, padding_side="left", names_filter=("resid_post", 2))[1][
        "resid_post", 2
    ]
    expected = model.run_with_cache(TEXTS[1])[1]["resid_post", 2][0, -1]
    torch.testing.assert_close(stream[1, -1], expected, atol=1e-4, rtol=1e-4)
    bare = model.to_tokens(TEXTS, prepend_bos=False, padding_side="left")
    alone = torch.stack([model(text, prepend_bos=False)[0, -1] for text in TEXTS])
    found = model(bare, prepend_bos=False, padding_side="left")[:, -1]
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
    alone = model.generate(model.to_tokens(TEXTS[1]), 3, False, do_sample=False)[:, -3:]
    assert torch.equal(model.generate(tokens, 3, False, do_sample=False, padding_side="left")[1:, -3:], alone)


def test_a_row_of_nothing_but_the_pad_token_is_run(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"), default_padding_side="left", prepend_bos=False)
    model.tokenizer.pad_token = model.tokenizer.eos_token
    row = torch.full((1, 4), model.tokenizer.pad_token_id)
    logits = model(row)
    model.tokenizer.padding_side = "right"
    assert torch.equal(logits, model(row))


def test_a_model_that_is_loaded_pads_on_the_right_whatever_was_saved(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "left")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    right, left = load(folder), load(folder, default_padding_side="left")
    assert torch.equal(right.to_tokens(TEXTS), right.to_tokens(TEXTS, padding_side="right"))
    assert torch.equal(left.to_tokens(TEXTS), right.to_tokens(TEXTS, padding_side="left"))
    # A tokenizer that is given keeps the side that it has been set to.
    given = AutoTokenizer.from_pretrained(folder)
    wrapped = HookedModel(AutoModelForCausalLM.from_pretrained(folder).eval(), given)
    assert torch.equal(wrapped.to_tokens(TEXTS), left.to_tokens(TEXTS))

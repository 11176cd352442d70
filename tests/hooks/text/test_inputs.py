"""Tokens and masks that a live model takes, or refuses in one sentence before anything is computed."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actstore.demo import MODEL_PATH
from actstore.errors import ActstoreError, TokensError
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> HookedModel:
    return HookedModel.from_pretrained(str(tiny_model("llama")), dtype="float32", device="cpu")


def refused(
    kind: type[ActstoreError], message: str, call: Callable[..., object], *arguments: Any, **options: Any
) -> None:
    with pytest.raises(kind, match=message) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# Masks


def rows(*values: float) -> list[list[float]]:
    return [list(values), [1] * len(values)]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1] * 4 + [2] * 4, [1] * 8]), r"has 2 in it.*each segment as a row of its own"),
        (torch.full((2, 8), 2, dtype=torch.uint8), "has 2 in it"),
        (torch.tensor(rows(-1e9, *[0] * 7)), r"has -1000000000.0 in it"),
        (torch.tensor(rows(-math.inf, *[0] * 7)), r"has -inf in it"),
        (torch.tensor(rows(0.5, *[1] * 7), dtype=torch.bfloat16), "has 0.5 in it"),
        (torch.tensor(rows(math.nan, *[1] * 7)), "has nan in it"),
        (rows(-1, *[1] * 7), "has -1 in it"),
        (torch.ones(2, 1, 8, 8), r"has shape \(2, 1, 8, 8\), and the token ids \(2, 8\)"),
        (torch.ones(1, 8), r"has shape \(1, 8\), and the token ids"),
        (torch.tensor(rows(*[0] * 8)), "leaves no token in row 0; leave the row out"),
        ("11111111", "attention_mask is '11111111'; give 1 for each token"),
        ([[1], [1, 0]], r"attention_mask is \[\[1\], \[1, 0\]\]"),
    ],
)
def test_a_mask_is_of_ones_and_zeros(llama: HookedModel, mask: Any, message: str) -> None:
    for call in (llama, llama.run_with_cache, llama.run_with_hooks):
        refused(TokensError, message, call, TOKENS, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16])
def test_a_mask_may_be_of_any_type(llama: HookedModel, dtype: torch.dtype) -> None:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    expected = llama.hf(TOKENS, attention_mask=mask.bool(), use_cache=False).logits
    logits, loss = llama(TOKENS, attention_mask=mask.to(dtype), return_type="both")
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real])
    torch.testing.assert_close(loss, llama(TOKENS, attention_mask=mask, return_type="loss"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_row_is_that_of_the_row_alone(llama: HookedModel, side: str) -> None:
    lengths = (5, 8)
    mask = torch.stack([torch.arange(8) < length for length in lengths])
    mask = mask.flip(-1) if side == "left" else mask
    in_batch = llama(TOKENS, attention_mask=mask, return_type="loss", loss_per_token=True)
    alone = [plain_losses(llama, row[real]) for row, real in zip(TOKENS, mask, strict=True)]
    for losses, expected in zip(in_batch, alone, strict=True):
        padding = len(losses) - len(expected)
        kept = losses[padding:] if side == "left" else losses[: len(expected)]
        torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)
        assert losses.count_nonzero() == len(expected)
    mean = llama(TOKENS, attention_mask=mask, return_type="loss")
    torch.testing.assert_close(mean, torch.cat(alone).mean(), atol=1e-5, rtol=1e-5)


def plain_losses(model: HookedModel, ids: Tensor) -> Tensor:
    """Losses [position - 1] of a row, by transformers and torch alone."""
    with torch.no_grad():
        logits = model.hf(ids[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def test_the_first_token_behind_a_gap_has_no_loss(llama: HookedModel) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    losses = llama(TOKENS[:1], attention_mask=mask, return_type="loss", loss_per_token=True)[0]
    alone = plain_losses(llama, TOKENS[0][mask[0].bool()])  # token 5 comes third there, behind token 2
    expected = torch.zeros(7)
    expected[[0, 1, 5, 6]] = alone[[0, 1, 3, 4]]
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    mean = llama(TOKENS[:1], attention_mask=mask, return_type="loss")
    torch.testing.assert_close(mean, expected.sum() / 4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_token", [True, False])
def test_a_loss_of_no_token_is_an_error(llama: HookedModel, per_token: bool) -> None:
    gaps = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]] * 2)
    for tokens, mask in ((TOKENS[:, :1], None), (TOKENS, gaps)):
        for return_type in ("loss", "both"):
            refused(
                TokensError,
                "no token has a loss",
                llama,
                tokens,
                attention_mask=mask,
                return_type=return_type,
                loss_per_token=per_token,
            )
        assert llama(tokens, attention_mask=mask).isfinite().all()


# Ids


@pytest.mark.parametrize(
    "ids",
    [
        *(TOKENS.to(dtype) for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float32)),
        [[True, False]],
        [[1.5]],
        torch.tensor(5),
        [[1, 2], [3]],
        [[None]],
        [2**70],
    ],
)
def test_ids_of_other_types_are_refused(llama: HookedModel, ids: Any) -> None:
    refused(TokensError, "expected token ids", llama, ids)


def test_int32_ids_are_ids(llama: HookedModel) -> None:
    assert torch.equal(llama(TOKENS.int()), llama(TOKENS))
    assert torch.equal(llama(TOKENS.int(), return_type="loss"), llama(TOKENS, return_type="loss"))


# Text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a text or a list of texts to tokenize, found None"),
        (5, "found 5"),
        ([], r"found \[\]"),
        (["a", None], "expected a text or a list"),
        (b"abc", "found b'abc'"),
        ((1, 2, 3), r"found \(1, 2, 3\)"),
        (TOKENS.float().numpy(), r"found ndarray of float32 and shape \(2, 8\)"),
        ({"a": "b"}, "found dict; give its input_ids"),
        ("a\ud83d", r"'a\\ud83d' has half a surrogate pair at character 1; mend it"),
        (["a", "\ude00"], "half a surrogate pair at character 0"),
    ],
)
def test_what_is_no_text(llama: HookedModel, text: Any, message: str) -> None:
    for call in (llama, llama.to_tokens, llama.run_with_cache):
        refused(TokensError, message, call, text)


def test_what_a_tokenizer_gives_is_not_taken_for_the_names_of_its_parts(llama: HookedModel) -> None:
    """Iterating over it gives its keys, so that a model would read the text "input_ids"."""
    given = llama.tokenizer("To be, or not", return_tensors="pt")
    refused(TokensError, "found BatchEncoding; give its input_ids", llama, given)


def test_half_a_surrogate_pair_is_named_by_every_method(llama: HookedModel) -> None:
    for call in (llama.to_single_token, llama.to_str_tokens, llama.to_tokens_and_mask):
        refused(TokensError, "half a surrogate pair at character 1", call, "x\ud83d")
    refused(TokensError, "half a surrogate pair", llama.get_token_position, "\ud83d", "abc")
    assert llama.to_string(llama.to_tokens("x\U0001f600", prepend_bos=False)) == ["x\U0001f600"]


@pytest.mark.parametrize("ids", [None, "abc", [1.5], -1, [True], torch.tensor([True]), [[1], None], 2**40])
def test_what_is_no_ids_has_no_text(llama: HookedModel, ids: Any) -> None:
    refused(TokensError, "expected token ids, found", llama.to_string, ids)
    if not isinstance(ids, str):
        refused(TokensError, "expected token ids, found", llama.to_str_tokens, ids)


# Special ids


def test_padding_needs_no_embedding(tmp_path: Path) -> None:
    """A pad token that only the tokenizer has is not looked up, since it is masked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(MODEL_PATH, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = HookedModel(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer)
    pad = tokenizer.pad_token_id
    assert pad >= model.cfg.d_vocab
    texts = ["my lord", "the king of France"]
    for side in ("left", "right"):
        logits, loss = model(texts, padding_side=side, return_type="both")
        ids, mask = model.to_tokens_and_mask(texts, padding_side=side)
        assert (ids[mask == 0] == pad).all()  # what the tokenizer says, to be decoded as such
        for row, real, text in zip(logits, mask.bool(), texts, strict=True):
            torch.testing.assert_close(row[real], model(text)[0], atol=1e-4, rtol=1e-4)
        losses = [model(text, return_type="loss", loss_per_token=True)[0] for text in texts]
        torch.testing.assert_close(loss, torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)
        for padding in (pad, -100, 10**6):
            other = ids.masked_fill(mask == 0, padding)
            _, cache = model.run_with_cache(other, attention_mask=mask, names_filter="*.hook_resid_post")
            assert torch.equal(
                cache["resid_post", -1], model.run_with_cache(texts, padding_side=side)[1]["resid_post", -1]
            )
            refused(
                TokensError,
                f"token id {padding} is outside of the {model.cfg.d_vocab} ids of this model; if it stands for "
                "padding, give attention_mask",
                model,
                other,
            )
    outside = re.escape(f"token id {pad} is outside of the {model.cfg.d_vocab} ids of this model")
    refused(TokensError, outside, model, "my lord<pad>")
    refused(TokensError, outside, model, torch.tensor([[pad, 5]]), attention_mask=torch.ones(1, 2))

"""Turning text into ids and back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from actstore.errors import TokensError
from actstore.hooks.text.prompts import Prompts

TinyModel = Callable[..., Path]


@pytest.fixture(scope="module")
def prompts(tiny_model: TinyModel) -> Prompts:
    return Prompts(AutoTokenizer.from_pretrained(tiny_model("llama")))


def test_bos_is_where_it_is_told_and_nowhere_else(prompts: Prompts) -> None:
    with_bos, _ = prompts.to_tokens("the king")
    without, _ = prompts.to_tokens("the king", prepend_bos=False)
    assert prompts.prepend_bos
    assert with_bos[0, 0] == prompts.tokenizer.bos_token_id
    assert torch.equal(with_bos[:, 1:], without)
    assert (without != prompts.tokenizer.bos_token_id).all()


def test_a_tokenizer_that_adds_bos_itself_does_not_add_a_second(tiny_model: TinyModel) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    assert tokenizer("a")["input_ids"][0] == 0
    ids, _ = Prompts(tokenizer).to_tokens("a king")
    assert (ids[0] == 0).sum() == 1
    ids, _ = Prompts(tokenizer).to_tokens("a king", prepend_bos=False)
    assert (ids[0] == 0).sum() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_length(prompts: Prompts, side: str) -> None:
    ids, mask = prompts.to_tokens(["a", "the king and the queen"], padding_side=side)  # type: ignore[arg-type]
    short = prompts.to_tokens("a")[0][0]
    assert mask.sum(-1).tolist() == [len(short), ids.shape[1]]
    assert torch.equal(ids[0][mask[0].bool()], short)
    assert bool(mask[0, 0]) == (side == "right")


def test_truncation(prompts: Prompts) -> None:
    ids, _ = prompts.to_tokens("the king and the queen", truncate=3)
    assert ids.shape == (1, 3)


def test_there_and_back(prompts: Prompts) -> None:
    text = "the king, and  the queen?"
    ids, _ = prompts.to_tokens(text, prepend_bos=False)
    assert prompts.to_string(ids[0]) == text
    assert prompts.to_string(ids) == [text]
    assert prompts.to_string(ids[0].tolist()) == text
    assert "".join(prompts.to_str_tokens(text, prepend_bos=False)) == text
    assert prompts.to_str_tokens(ids) == prompts.to_str_tokens(text, prepend_bos=False)


def test_pieces_of_several(prompts: Prompts) -> None:
    texts = ["the king", "a queen and"]
    pieces = [prompts.to_str_tokens(text) for text in texts]
    assert prompts.to_str_tokens(texts) == pieces
    rows = [prompts.to_tokens(text)[0] for text in texts]
    assert prompts.to_str_tokens(rows) == pieces
    assert prompts.to_str_tokens([row[0].numpy() for row in rows]) == pieces
    assert prompts.to_str_tokens(rows[0].T) == pieces[0]  # a column, as topk gives it
    assert prompts.to_str_tokens(rows[0][0, 1]) == [pieces[0][1]]
    assert prompts.to_string([row[0] for row in rows]) == ["".join(row) for row in pieces]
    assert prompts.to_string(list(rows[0][0])) == "".join(pieces[0])
    with pytest.raises(TokensError, match="pieces are those of one row, and there are 2"):
        prompts.to_str_tokens(rows[0].repeat(2, 1))


def test_rows_are_padded_where_the_tokenizer_says(tiny_model: TinyModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"), padding_side="left")
    prompts, texts = Prompts(tokenizer), ["a", "the king"]
    assert torch.equal(
        prompts.to_tokens(texts, padding_side=None)[1], prompts.to_tokens(texts, padding_side="left")[1]
    )
    assert not torch.equal(prompts.to_tokens(texts)[1], prompts.to_tokens(texts, padding_side=None)[1])


def test_errors_are_those_that_notebooks_catch(prompts: Prompts) -> None:
    with pytest.raises(AssertionError):
        prompts.to_single_token(" Mary")
    with pytest.raises(AssertionError):
        prompts.get_token_position(" the", "a")
    assert prompts.get_token_position(torch.tensor(prompts.to_single_token(" the")), "see the king") > 0  # type: ignore[arg-type]


def test_a_text_of_one_token(prompts: Prompts) -> None:
    assert prompts.to_string(prompts.to_single_token(" the")) == " the"
    with pytest.raises(TokensError, match=r"' Mary' is 4 tokens of .*, not one: ' ' \+ 'M' \+ 'ar' \+ 'y'"):
        prompts.to_single_token(" Mary")
    with pytest.raises(TokensError, match="'' is 0 tokens"):
        prompts.to_single_token("")


def test_where_a_token_is(prompts: Prompts) -> None:
    text = "see the king and the queen"
    first = prompts.get_token_position(" the", text)
    last = prompts.get_token_position(" the", text, mode="last")
    pieces = prompts.to_str_tokens(text)
    assert first < last
    assert pieces[first] == pieces[last] == " the"
    assert prompts.get_token_position(" the", text, prepend_bos=False) == first - 1
    with pytest.raises(TokensError, match="token ' the' is not in '<bos>' \\+ 'a'"):
        prompts.get_token_position(" the", "a")


def test_what_is_no_text(prompts: Prompts) -> None:
    with pytest.raises(TokensError, match="expected a text or a list of texts"):
        prompts.to_tokens([])
    with pytest.raises(TokensError, match="text 1 gives no token"):
        prompts.to_tokens(["a", ""], prepend_bos=False)


def test_a_tokenizer_without_bos(tiny_model: TinyModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.bos_token = None
    prompts = Prompts(tokenizer)
    assert not prompts.prepend_bos
    with pytest.raises(TokensError, match="has no BOS token to prepend; choose prepend_bos=False"):
        prompts.to_tokens("a", prepend_bos=True)
    with pytest.raises(TokensError, match="prepend_bos is True, but"):
        Prompts(tokenizer, prepend_bos=True)

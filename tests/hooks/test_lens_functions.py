"""``actstore.utils`` against ``transformer_lens.utils``."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformer_lens import FactoredMatrix as TheirMatrix
from transformer_lens import utilities as theirs
from transformers import AutoTokenizer

import actstore
from actstore import utils as ours
from actstore.demo import MODEL_PATH
from actstore.errors import TokensError

MAKE = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 6, 9, generator=MAKE)
TOKENS = torch.randint(0, 9, (2, 6), generator=MAKE)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
SQUARE = torch.randn(4, 4, generator=MAKE)


def test_it_is_a_module_of_the_package() -> None:
    assert actstore.utils is ours
    for name in ours.__all__:
        assert hasattr(theirs, name), name
        assert hasattr(ours, name)


@pytest.mark.parametrize(
    "call",
    [
        lambda of: of.lm_cross_entropy_loss(LOGITS, TOKENS),
        lambda of: of.lm_cross_entropy_loss(LOGITS, TOKENS, MASK),
        lambda of: of.lm_cross_entropy_loss(LOGITS, TOKENS, MASK, per_token=True),
        lambda of: of.lm_accuracy(LOGITS, TOKENS),
        lambda of: of.lm_accuracy(LOGITS, TOKENS, per_token=True),
        lambda of: of.to_numpy(LOGITS.bfloat16()),
        lambda of: of.to_numpy(torch.nn.Parameter(LOGITS)),
        lambda of: of.to_numpy([1, 2]),
        lambda of: of.to_numpy(3.5),
        lambda of: of.remove_batch_dim(LOGITS[:1]),
        lambda of: of.remove_batch_dim(LOGITS),
        lambda of: of.get_corner(LOGITS, 2),
        lambda of: of.transpose(LOGITS),
        lambda of: [of.is_square(x) for x in (SQUARE, LOGITS, SQUARE[:2])],
        lambda of: [of.is_lower_triangular(x) for x in (SQUARE, SQUARE.tril(), SQUARE[:2].tril())],
        lambda of: of.get_cumsum_along_dim(LOGITS, 1, reverse=True),
        lambda of: of.get_cumsum_along_dim(LOGITS, -1),
        lambda of: of.repeat_along_head_dimension(LOGITS, 3),
        lambda of: of.repeat_along_head_dimension(LOGITS, 3, clone_tensor=False),
        lambda of: of.gelu_new(LOGITS),
        lambda of: of.gelu_fast(LOGITS),
        lambda of: of.solu(LOGITS),
        lambda of: of.filter_dict_by_prefix({"a.b": 1, "a.c.d": 2, "ab.c": 3}, "a"),
        lambda of: of.get_nested_attr(LOGITS, "mT.ndim"),
        lambda of: of.get_device(),
        lambda of: of.keep_single_column(Dataset.from_dict({"a": [1], "b": [2]}), "b").column_names,
    ],
)
def test_values_are_equal(call: Callable[[Any], Any]) -> None:
    found, expected = call(ours), call(theirs)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_names_of_hooks() -> None:
    for name, layer, part in product(
        ("z", "k", "resid_post", "pattern", "attn", "pre", "mlp_out", "scale", "normalized", "key"),
        (0, 11),
        (None, "a", "m", "ln1", "ln2", "attn", "block"),
    ):
        assert ours.get_act_name(name, layer, part) == theirs.get_act_name(name, layer, part)
    for name in ("embed", "k6", "scale4ln1", "pre5", "hook_embed", "blocks.3.hook_resid_mid", "scale"):
        assert ours.get_act_name(name) == theirs.get_act_name(name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_masks_of_padding(side: str, prepend_bos: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, padding_side=side)
    tokenizer.pad_token = tokenizer.bos_token
    begin = [tokenizer.bos_token_id] * prepend_bos
    rows = [[*begin, 5, 6, 7], [*begin, 8]]
    padding = [tokenizer.pad_token_id] * 2
    rows[1] = rows[1] + padding if side == "right" else padding + rows[1]
    tokens = torch.tensor(rows)
    found = ours.get_attention_mask(tokenizer, tokens, prepend_bos)
    assert torch.equal(found, theirs.get_attention_mask(tokenizer, tokens, prepend_bos))
    assert found.sum() == 4 + 2 * prepend_bos


@pytest.mark.parametrize("broadcast", [False, True])
def test_composition(broadcast: bool) -> None:
    first, second = (
        [torch.randn(shape, generator=MAKE) for shape in ((3, 5, 2), (3, 2, 5))] for _ in range(2)
    )
    found = ours.composition_scores(
        actstore.FactoredMatrix(*first), actstore.FactoredMatrix(*second), broadcast_dims=broadcast
    )
    expected = theirs.composition_scores(TheirMatrix(*first), TheirMatrix(*second), broadcast_dims=broadcast)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("answer", ["lord", ["lord", "king", "queen"], "lord and"])
@pytest.mark.parametrize("details", [False, True])
def test_a_prompt_is_tested(capsys: pytest.CaptureFixture[str], answer: Any, details: bool) -> None:
    model = actstore.HookedModel.from_pretrained(MODEL_PATH)
    printed = []
    for functions in (ours, theirs):
        functions.test_prompt("I thank you, my good", answer, model, print_details=details, top_k=4)
        printed.append(" ".join(capsys.readouterr().out.split()))
    assert printed[0] == printed[1]
    assert "Ranks of the answer tokens: [" in printed[0]


@pytest.mark.parametrize("max_length", [8, 100])
@pytest.mark.parametrize("has_pad", [False, True])
def test_texts_are_joined_in_rows(max_length: int, has_pad: bool) -> None:
    texts = Dataset.from_dict(
        {"text": ["My lord, I came to see", "your father's funeral", ""], "n": [1, 2, 3]}
    )
    rows = []
    for functions in (ours, theirs):
        tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
        tokenizer.pad_token = "!" if has_pad else None
        n_tokens = len(tokenizer)
        rows.append(
            functions.tokenize_and_concatenate(texts, tokenizer, max_length=max_length, num_proc=None)[
                "tokens"
            ]
        )
        if functions is ours:
            assert len(tokenizer) == n_tokens
    assert torch.equal(rows[0][:], rows[1][:])
    assert rows[0][:].shape[1] == max_length


def test_texts_cannot_be_joined_without_what_comes_between() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.eos_token = None
    with pytest.raises(TokensError, match="this tokenizer lacks the EOS token that comes between texts"):
        ours.tokenize_and_concatenate(Dataset.from_dict({"text": ["a"]}), tokenizer)

"""The embedded model is small, reads its own text, and has the induction head the demo shows."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from actstore.demo import MODEL_PATH, TEXT_PATH

N_BLOCK = 50
N_ROWS = 16


@cache
def load_model() -> GPT2LMHeadModel:
    # Eager attention is the only one that returns its pattern.
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, attn_implementation="eager").eval()


@cache
def load_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def repeated_rows() -> torch.Tensor:
    """Rows of bos and a block of distinct random tokens, twice: each token has one earlier occurrence."""
    generator = torch.Generator().manual_seed(1234)
    n_vocab = load_model().config.vocab_size
    blocks = torch.stack(
        [torch.randperm(n_vocab - 1, generator=generator)[:N_BLOCK] + 1 for _ in range(N_ROWS)]
    )
    bos = torch.full((N_ROWS, 1), load_tokenizer().bos_token_id)
    return torch.cat([bos, blocks, blocks], dim=1)


def test_bundled_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) <= 6_000_000
    assert TEXT_PATH.stat().st_size <= 1_500_000


@torch.no_grad()
def test_one_head_attends_to_the_token_after_the_earlier_occurrence() -> None:
    attentions = load_model()(repeated_rows(), output_attentions=True).attentions
    queries = torch.arange(1 + N_BLOCK, 1 + 2 * N_BLOCK)
    scores = torch.stack(attentions)[..., queries, queries - N_BLOCK + 1].mean(dim=(1, 3))
    assert scores.max() > 0.5, f"mean attention to the induction target, by layer and head: {scores.tolist()}"


@torch.no_grad()
def test_second_repeat_is_far_easier_than_the_first() -> None:
    rows = repeated_rows()
    logits = load_model()(rows).logits[:, :-1].transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, rows[:, 1:], reduction="none")
    first, second = losses[:, :N_BLOCK].mean(), losses[:, N_BLOCK + 1 :].mean()
    assert second < first / 3


@torch.no_grad()
def test_model_predicts_its_own_text() -> None:
    ids = load_tokenizer().encode(TEXT_PATH.read_text(encoding="utf-8")[:4000])[:256]
    loss = load_model()(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert loss < 5.0, "an untrained model has ln 2048 = 7.6"


@pytest.mark.parametrize(
    "text", ["To be, or not to be.\n\nHAMLET.\n", "  two  spaces\t", "naïve café, 東京 🙂", ""]
)
def test_tokenizer_gives_the_text_back(text: str) -> None:
    assert load_tokenizer().decode(load_tokenizer().encode(text)) == text


def test_tokenizer_has_bos_and_eos_but_adds_neither() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == load_model().config.bos_token_id
    assert tokenizer.bos_token_id not in tokenizer.encode("To be")
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.bos_token_id]
    assert len(tokenizer) == load_model().config.vocab_size

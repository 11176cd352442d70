"""A tiny byte-level BPE tokenizer that is trained when the tests start."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PLAY = "".join(
    f"Enter the {i}th ghost, with a torch.\n\nGHOST {i}: Who goes there? I am thy father's spirit, doomed "
    f"for a certain term to walk the night number {i * i}.\n"
    for i in range(400)
)


def train(vocab_size: int = 600) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PLAY], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train()


@pytest.fixture(scope="session")
def play() -> str:
    return PLAY

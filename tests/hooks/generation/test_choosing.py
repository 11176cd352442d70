"""How logits are changed before the next token is chosen."""

from typing import Any

import torch

from actstore.hooks.generation.choosing import Choosing


def choosing(**settings: Any) -> Choosing:
    given: dict[str, Any] = {"top_k": None, "top_p": None, "freq_penalty": 0.0, "repetition_penalty": 1.0}
    return Choosing(
        max_new_tokens=1, do_sample=True, eos_token_ids=(), **{**given, "temperature": 1.0, **settings}
    )


def test_the_frequency_penalty_is_subtracted_from_logits_that_are_divided_by_the_temperature() -> None:
    """As in TransformerLens; Hugging Face divides after the penalty."""
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 1, 3, 1], [8, 0, 0, 5]])
    (penalised,) = choosing(temperature=0.5, freq_penalty=1.5).processors()
    counts = torch.stack([torch.bincount(row, minlength=9) for row in ids])
    torch.testing.assert_close(penalised(ids, logits) / 0.5, logits / 0.5 - 1.5 * counts)
    assert choosing(temperature=0.5).processors() == []
    assert choosing(temperature=0.0, freq_penalty=1.5).processors() == []

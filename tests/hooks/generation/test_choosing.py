"""How logits are changed before the next token is chosen."""

from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

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
    whole = torch.ones_like(ids)
    (penalised,) = choosing(temperature=0.5, freq_penalty=1.5).processors(whole)
    counts = torch.stack([torch.bincount(row, minlength=9) for row in ids])
    torch.testing.assert_close(penalised(ids, logits) / 0.5, logits / 0.5 - 1.5 * counts)
    assert choosing(temperature=0.5).processors(whole) == []
    assert choosing(temperature=0.0, freq_penalty=1.5).processors(whole) == []


def test_the_repetition_penalty_is_that_of_hugging_face() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 1, 3, 1], [8, 0, 0, 5]])
    (penalised,) = choosing(repetition_penalty=1.7).processors(torch.ones_like(ids))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    torch.testing.assert_close(penalised(ids, logits), expected)


@pytest.mark.parametrize("settings", [{"freq_penalty": 1.5}, {"repetition_penalty": 3.0}])
def test_padding_is_no_token_that_is_there(settings: dict[str, float]) -> None:
    """A row has the logits that it has alone; new tokens count as those of the prompt."""
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 3, 2]])
    (alone,) = choosing(**settings).processors(torch.ones(1, 2))
    (padded,) = choosing(**settings).processors(torch.tensor([[0, 0, 1, 1]]))
    result = padded(torch.tensor([[7, 7, 1, 3, 2]]), logits)
    torch.testing.assert_close(result, alone(ids, logits))
    assert result[0, 7] == logits[0, 7]
    assert (result != logits)[0].nonzero().flatten().tolist() == [1, 2, 3]

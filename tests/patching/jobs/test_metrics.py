"""The metrics of a job are what PyTorch has for them, as means over positions."""

import pytest
import torch

from actstore.patching.jobs.job import MetricName
from actstore.patching.jobs.metrics import metric_of


@pytest.mark.parametrize("name", ["logit_difference", "logit", "log_probability", "probability"])
@pytest.mark.parametrize("n_positions", [1, 3])
def test_each_prompt_has_the_mean_over_positions(name: MetricName, n_positions: int) -> None:
    logits = 4 * torch.randn(2, n_positions, 9, generator=torch.Generator().manual_seed(0))
    answers, wrong = torch.tensor([3, 0]), torch.tensor([8, 5])
    expected = []
    for prompt in range(2):
        at_answer = logits[prompt, :, answers[prompt]]
        probabilities = logits[prompt].softmax(-1)[:, answers[prompt]]
        numbers = {
            "logit_difference": at_answer - logits[prompt, :, wrong[prompt]],
            "logit": at_answer,
            "log_probability": probabilities.log(),
            "probability": probabilities,
        }
        expected.append(numbers[name].mean())
    torch.testing.assert_close(metric_of(name, answers, wrong)(logits), torch.stack(expected))

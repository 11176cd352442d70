"""The metrics of a job: one number for each prompt, from logits and the ids of its answers."""

from typing import TYPE_CHECKING

from actstore.patching.engine.metric import Metric
from actstore.patching.jobs.job import MetricName

if TYPE_CHECKING:
    import torch


def metric_of(name: MetricName, answers: "torch.Tensor", wrong: "torch.Tensor") -> Metric:
    """The metric of this name.

    Args:
        name: see `PatchJob.metric`. Logarithms are natural.
        answers: ids of the right answers [prompt].
        wrong: ids of the wrong answers [prompt]; only ``logit_difference`` reads them.

    Returns:
        A function of logits [prompt, position, d_vocab] that gives the mean over positions, float32 [prompt].
    """

    def metric(logits: "torch.Tensor") -> "torch.Tensor":
        logits = logits.float()
        values = _at(logits, answers)
        if name == "logit_difference":
            values = values - _at(logits, wrong)
        elif name != "logit":
            values = values - logits.logsumexp(-1)
        return (values.exp() if name == "probability" else values).mean(1)

    return metric


def _at(logits: "torch.Tensor", tokens: "torch.Tensor") -> "torch.Tensor":
    """The entries of one token for each prompt [prompt, position]."""
    index = tokens.to(logits.device).view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    return logits.gather(-1, index)[..., 0]

"""Sampling that depends on a seed for each row, and on no other row of the batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Makes the likeliest token one that is drawn from the distribution, for a generation that takes the likeliest.

    The largest of ``logits - log(e)``, with ``e`` exponentially distributed and independent for each token, is token i
    with the probability that softmax gives it: the Gumbel-max trick. So the draws of a row need its own generator only.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """
        Args:
            seeds: one for each row, below 2^63.
        """
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        """Scores [n_rows, n_ids], of which the largest of each row is the drawn token."""
        del input_ids
        # On the CPU, so that a seed means the same on any device.
        drawn = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self._generators]
        )
        return scores.float() - drawn.log().to(scores.device)

"""A plain SAE, in a module of its own, so that Ray's workers need not import SAELens for it."""

import torch
from torch import Tensor, nn


class PlainSae(nn.Module):
    """An SAE as in dictionary_learning: rectified, with weights and no configuration."""

    def __init__(self, d_in: int, d_sae: int, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.encoder = nn.Parameter(torch.randn(d_in, d_sae, generator=random) / d_in**0.5)
        self.bias = nn.Parameter(torch.randn(d_sae, generator=random) - 1)
        self.decoder = nn.Parameter(torch.randn(d_sae, d_in, generator=random) / d_sae**0.5)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.encoder + self.bias)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.decoder

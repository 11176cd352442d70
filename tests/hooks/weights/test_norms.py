"""The scale and the normalized value of a norm, against its definition."""

import pytest
import torch
from torch.nn import functional

from actstore.hooks.weights.norms import normalize


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_small_values_are_normed_as_large_ones(size: float) -> None:
    """The place where epsilon is added matters for values near it."""
    value = size * torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) + size
    for norm, expected in (
        ("layer", functional.layer_norm(value, (16,), eps=1e-5)),
        ("rms", functional.rms_norm(value, (16,), eps=1e-5)),
    ):
        scale, normalized = normalize(value, 1e-5, norm=norm)  # type: ignore[arg-type]
        torch.testing.assert_close(normalized, expected)
        centred = value - value.mean(-1, keepdim=True) if norm == "layer" else value
        torch.testing.assert_close(normalized * scale, centred)

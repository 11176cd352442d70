"""LayerNorm and RMSNorm: what they divide by, and the gain and bias that follow."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.hooks.families.architectures import Norm
from actstore.hooks.weights.used_weights import norm as used_norm

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class NormWeights:
    """Gain and bias of a norm, which makes ``value * w + b`` of a normalized value."""

    w: "torch.Tensor"
    """Gain [d], by which the norm multiplies. For Gemma it is 1 + weight in float32, as the model computes it."""
    b: "torch.Tensor"
    """Bias [d]; zeros if there is none."""


def norm_weights(module: Any, kind: Norm) -> NormWeights:
    """Gain and bias of a norm module.

    Raises:
        ModelError: the module does not use its weight alone.
    """
    used = used_norm(module)
    weight: torch.Tensor = used.weight
    bias: torch.Tensor | None = getattr(used, "bias", None)
    return NormWeights(
        1.0 + weight.float() if kind == "rms_plus_one" else weight,
        weight.new_zeros(weight.shape) if bias is None else bias,
    )


def normalize(value: "torch.Tensor", eps: float, *, norm: Norm) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The scale [..., 1] of a norm and the value divided by it, float32, before gain and bias.

    LayerNorm: https://arxiv.org/abs/1607.06450, RMSNorm: https://arxiv.org/abs/1910.07467.
    """
    value = value.float()
    if norm == "layer":
        value = value - value.mean(-1, keepdim=True)
    scale = (value.square().mean(-1, keepdim=True) + eps).sqrt()
    return scale, value / scale


def eps_of(module: Any) -> float:
    """The epsilon of a norm module of transformers or of PyTorch, also in an adapter."""
    module = getattr(module, "base_layer", getattr(module, "original_module", module))
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)

"""What a norm does to first order, at the values of a run: steps of its input, and gradients of its output."""

from typing import TYPE_CHECKING, Any

from actstore.hooks.families.architectures import Norm
from actstore.hooks.weights.norms import eps_of, norm_weights, normalize

if TYPE_CHECKING:
    import torch


class NormJacobian:
    """The derivative of a norm at each position."""

    def __init__(self, module: Any, kind: Norm, value: "torch.Tensor") -> None:
        """
        Args:
            module: the norm.
            kind: what it computes.
            value: its input [prompt, position, d_model].

        Raises:
            ModelError: the norm does not use its weight alone.
        """
        self._is_centred = kind == "layer"
        self._gain = norm_weights(module, kind).w.detach().float()
        self._scale, self._normalized = normalize(value.detach(), eps_of(module), norm=kind)

    def of_step(self, step: "torch.Tensor") -> "torch.Tensor":
        """The step of the output for steps of the input, float32 [..., prompt, position, d_model]."""
        return self._symmetric(step.float()) * self._gain

    def of_gradient(self, gradient: "torch.Tensor") -> "torch.Tensor":
        """The gradient of the input for gradients of the output, float32 [..., prompt, position, d_model]."""
        return self._symmetric(gradient.float() * self._gain)

    def _symmetric(self, value: "torch.Tensor") -> "torch.Tensor":
        """The derivative of value / scale, which is its own transpose."""
        along = (value * self._normalized).mean(-1, keepdim=True)
        if self._is_centred:
            value = value - value.mean(-1, keepdim=True)
        return (value - self._normalized * along) / self._scale

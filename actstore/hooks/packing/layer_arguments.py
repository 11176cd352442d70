"""The arguments that a base model calls a layer with, for other positions than those of the call."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerArguments:
    """What a layer was called with, beside the residual stream, over rows of ``length`` positions."""

    args: tuple[Any, ...]
    """Arguments without names, behind the residual stream."""
    kwargs: dict[str, Any]
    has_named_stream: bool
    """Whether the layer takes the residual stream under its name, ``hidden_states``."""
    length: int

    def at(self, positions: "torch.Tensor") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same for a single row with a token at each of these positions [token]; masks become None."""
        args = tuple(self._at(value, positions) for value in self.args)
        return args, {name: self._at(value, positions) for name, value in self.kwargs.items()}

    def _at(self, value: Any, positions: "torch.Tensor") -> Any:
        import torch

        if isinstance(value, tuple):
            return tuple(self._at(part, positions) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        if value.ndim >= 3 and value.shape[-2:] == (self.length, self.length) and value.ndim == 4:
            return None
        if value.ndim == 1 and len(value) == self.length:
            return value[positions]
        if value.ndim >= 2 and value.shape[1] == self.length:
            return value[:1, positions]  # positions are the same in every row
        return value

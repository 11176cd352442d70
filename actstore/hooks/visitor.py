"""What the forward of a hooked model meets at each hook."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Visitor(Protocol):
    """Sees the values of hooks as the forward reaches them."""

    def edits(self, name: str) -> bool:
        """Whether `visit` may change this value, so that what follows must be computed from its result."""
        ...

    def visit(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        """Takes a value [batch, position, ...], a view into the model; gives it back, or another in its place.

        What is kept must be copied: later modules may change the memory.
        """
        ...

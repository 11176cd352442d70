"""What is put into the forward at a hook and has hooks of its own, such as a sparse autoencoder."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Visit = Callable[[str, "torch.Tensor"], "torch.Tensor"]
"""Shows the value of an inner hook by its canonical name, and returns the value to go on with."""


class Inserted(Protocol):
    """Computes what the model goes on with in place of the value of a hook."""

    def __call__(self, name: str, value: "torch.Tensor", visit: Visit) -> "torch.Tensor":
        """The value to go on with.

        Args:
            name: the hook.
            value: its value, after the functions on it; a view into the model, not to be edited.
            visit: to be called for each inner hook.
        """
        ...

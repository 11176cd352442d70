"""What the forward of a hooked model meets at each hook."""

from collections.abc import Callable, Iterable
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


def shown(visitor: Visitor, name: str, value: "torch.Tensor") -> tuple["torch.Tensor", bool]:
    """Show a value that was computed for the hook alone; (what comes of it, whether it is another now).

    With a graph it always counts as another one: what follows must be computed from it, or it would have no gradient.
    """
    import torch

    if not visitor.edits(name):
        return visitor.visit(name, value), False
    if torch.is_grad_enabled():
        value = value.clone()  # an edit in place must not reach what autograd has saved
        return visitor.visit(name, value), True
    version = value._version
    new = visitor.visit(name, value)
    return new, new is not value or value._version != version


Sink = Callable[[str, "torch.Tensor"], None]
"""Takes (hook name, value [batch, ...]). The value must be copied before the sink returns."""


class Finished(Exception):  # noqa: N818 - not an error
    """Raised by a visitor that has seen enough; ends the forward there."""


class Handing:
    """Visitor that hands values on, and ends the forward after the last."""

    def __init__(self, hooks: Iterable[str], sink: Sink) -> None:
        self.waiting = set(hooks)
        self._sink = sink

    def edits(self, name: str) -> bool:
        del name
        return False

    def visit(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        self._sink(name, value)
        self.waiting.discard(name)
        if not self.waiting:
            raise Finished
        return value


class Ending:
    """Visitor that ends the forward when another has seen all it wants."""

    def __init__(self, inner: Visitor, names: Iterable[str]) -> None:
        self._inner = inner
        self._waiting = set(names)

    def edits(self, name: str) -> bool:
        return self._inner.edits(name)

    def visit(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        value = self._inner.visit(name, value)
        self._waiting.discard(name)
        if not self._waiting:
            raise Finished
        return value

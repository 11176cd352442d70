"""Visitors: what the forward of a hooked model calls at each hook."""

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
        """Take a value [batch, position, ...], a view into the model, and return it or another value in its place.

        A visitor that keeps the value must copy it: later modules may change the memory.
        """
        ...


def shown(visitor: Visitor, name: str, value: "torch.Tensor") -> tuple["torch.Tensor", bool]:
    """Show a value that was computed for the hook alone.

    Returns:
        (value after the visit, whether it was changed). With a graph it always counts as changed: what follows must be
        computed from it, or it would have no gradient. So it does in inference mode, where edits in place leave no
        trace.
    """
    import torch

    if not visitor.edits(name):
        return visitor.visit(name, value), False
    if torch.is_grad_enabled():
        value = value.clone()  # an edit in place must not reach what autograd has saved
        return visitor.visit(name, value), True
    if value.is_inference():
        return visitor.visit(name, value), True
    version = value._version
    new = visitor.visit(name, value)
    return new, new is not value or value._version != version


Sink = Callable[[str, "torch.Tensor"], None]
"""A function that takes (hook name, value [batch, ...]). It must copy the value before it returns."""


class Finished(Exception):  # noqa: N818 - not an error
    """Raised by a visitor to end the forward when it needs no more values."""


class Handing:
    """A visitor that hands values to a sink, and ends the forward after the last one."""

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
    """A visitor around another one that ends the forward when all its hooks have been visited."""

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

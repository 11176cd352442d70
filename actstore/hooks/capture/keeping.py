"""The visitor of a hooked model: it calls the functions on hooks, and keeps values."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from actstore.hooks.capture.functions import HookFunctions
from actstore.hooks.naming.names import HookNames, stored_as

if TYPE_CHECKING:
    import torch


class Keeping:
    """A visitor that calls the functions on hooks and keeps copies of the values of chosen hooks."""

    def __init__(
        self,
        functions: HookFunctions,
        wanted: Iterable[str] = (),
        *,
        copy: "Callable[[str, torch.Tensor], torch.Tensor]" = lambda _name, value: value,
        keep_graph: bool = False,
    ) -> None:
        """
        Args:
            functions: functions on the hooks of the model.
            wanted: names of the hooks whose values are kept.
            copy: takes (name, value) and returns the copy that is kept.
            keep_graph: the forward records a graph: keep the values themselves, so that gradients with respect to
                them can be asked for, and let functions see the gradients.
        """
        self.values: dict[str, torch.Tensor] = {}
        self._functions = functions
        self._with_gradients = frozenset(functions.names_for_gradients if keep_graph else ())
        self._wanted = frozenset(wanted)
        self._copy = copy
        self._keep_graph = keep_graph

    @property
    def names(self) -> frozenset[str]:
        """Names of all hooks that the forward must visit."""
        return self._wanted | frozenset(self._functions.names) | self._with_gradients

    def edits(self, name: str) -> bool:
        has_functions = name in self._functions or name in self._with_gradients
        return has_functions or (self._keep_graph and name in self._wanted)

    def visit(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        if name in self._functions or name in self._with_gradients:
            value = self._functions.replaced(name, value, self.visit)
        if name in self._wanted:
            self._keep(name, value)
        return value

    def _keep(self, name: str, value: "torch.Tensor") -> None:
        same = self.values.get(stored_as(name))
        if self._keep_graph:
            # The very tensor that the forward goes on with, or nothing would flow back to it.
            self.values[name] = value
        elif same is not None and name not in self._functions:
            self.values[name] = same  # the stream out of the layer before is the stream into this one
        else:
            self.values[name] = self._copy(name, value)


def in_forward_order(values: "Mapping[str, torch.Tensor]", names: HookNames) -> "dict[str, torch.Tensor]":
    """The same values in the order in which the model has their hooks."""
    return {name: values[name] for name in names.all if name in values}

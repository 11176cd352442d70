"""Functions on hooks, and the visitor that calls them and keeps values."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from actstore.errors import HookError
from actstore.hooks.capture.exclusive import in_function
from actstore.hooks.capture.raw_calls import RawCalls
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.naming.names import HookName, HookNames, defaults_of, layer_of, stored_as
from actstore.reason import reason

if TYPE_CHECKING:
    import torch


@dataclass
class HookPoint:
    """The second argument of a function on a hook, which says which hook it is."""

    name: str
    ctx: dict[str, Any] = field(default_factory=dict)
    """A place for values of the function, kept from call to call until `HookedModel.reset_hooks`."""

    def layer(self) -> int:
        """The layer of the hook.

        Raises:
            HookError: the hook is outside of layers.
        """
        number = layer_of(self.name)
        if number is None:
            raise HookError(f"{self.name} is outside of the layers")
        return number


class HookFunction(Protocol):
    """A function that is called as ``function(value, hook=point)``.

    It returns a new value, or None to keep the value, which it may have edited in place.
    """

    def __call__(self, value: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor | None": ...


NameFilter = HookName | Iterable[HookName] | Callable[[str], bool]
"""Names or globs in any spelling, or a function that takes a canonical name and says yes or no."""


def selected(names: HookNames, chosen: NameFilter, *, is_exact: bool = False) -> tuple[str, ...]:
    """The canonical names that a filter selects, in the order of the forward.

    A function that says yes to every hook selects only those captured by default, from which the others are computed;
    with ``is_exact`` it selects every hook.

    Raises:
        HookError: a name or glob matches nothing, or the function says no to every hook.
    """
    if chosen is None or isinstance(chosen, int | float):
        raise HookError(f"expected names of hooks or a function of the name, found {quoted(chosen)}")
    if callable(chosen):
        matches = {name for name in names.all if chosen(name)}
        if not matches:
            raise HookError("the function that filters hooks says no to every hook of this model")
        is_default = len(matches) == len(names.all) and not is_exact
        return names.ordered(defaults_of(matches) if is_default else matches)
    return names.select(chosen)


class HookFunctions:
    """The functions on the hooks of one model."""

    def __init__(self, names: HookNames, raw_calls: RawCalls) -> None:
        """
        Args:
            names: all hooks of the model.
            raw_calls: the watch over calls of the model that would skip the functions; on while there are any.
        """
        self._names = names
        self._raw_calls = raw_calls
        self._changing = threading.Lock()
        self._functions: dict[str, list[HookFunction]] = {}
        self._points: dict[str, HookPoint] = {}

    def add(self, chosen: NameFilter, function: HookFunction) -> tuple[str, ...]:
        """Add a function to hooks and return their names. Functions on one hook are called in the order of adding."""
        if not callable(function):
            raise HookError(f"expected a function to add to {quoted(chosen)}, found {quoted(function)}")
        names = selected(self._names, chosen)
        with self._changing:
            for name in names:
                self._functions.setdefault(name, []).append(function)
            self._raw_calls.refuse()
        return names

    def clear(self) -> None:
        """Remove all functions, and forget what they have kept in ``hook.ctx``."""
        with self._changing:
            self._functions.clear()
            self._points.clear()
            self._raw_calls.admit()

    @contextmanager
    def added(self, pairs: Sequence[tuple[NameFilter, HookFunction]]) -> Iterator[None]:
        """Add functions for the duration of a context. Functions that were added before stay."""
        added: list[tuple[str, HookFunction]] = []
        if not isinstance(pairs, Iterable):
            raise HookError(f"expected pairs of (name, function), found {quoted(pairs)}")
        try:
            for pair in pairs:
                if not isinstance(pair, tuple) or len(pair) != 2 or not callable(pair[1]):
                    raise HookError(f"expected pairs of (name, function), found {quoted(pair)}")
                chosen, function = pair
                added += [(name, function) for name in self.add(chosen, function)]
            yield
        finally:
            with self._changing:
                for name, function in added:
                    self._remove(name, function)
                if not self._functions:
                    self._raw_calls.admit()

    def _remove(self, name: str, function: HookFunction) -> None:
        """Remove a function from a hook, the last one if it is there several times; `clear` may have removed it."""
        functions = self._functions.get(name, [])
        for index in reversed(range(len(functions))):
            if functions[index] is function:
                del functions[index]
                break
        if not functions:
            self._functions.pop(name, None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hooks that have a function."""
        return tuple(self._functions)

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def call(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        """The value after all functions of a hook.

        Raises:
            HookError: a function cannot be called so, or returns anything but None or a tensor of the same shape.
        """
        import torch

        point = self._points.setdefault(name, HookPoint(name))
        for function in self._functions.get(name, ()):
            try:
                with in_function():
                    result: Any = function(value, hook=point)
            except TypeError as error:
                if "hook" not in str(error) or "argument" not in str(error):
                    raise
                raise HookError(
                    f"the function on {name} cannot be called as function(value, hook=point): {reason(error)}"
                ) from error
            if result is None:
                continue
            if not isinstance(result, torch.Tensor) or result.shape != value.shape:
                kind = (
                    f"shape {tuple(result.shape)}"
                    if isinstance(result, torch.Tensor)
                    else type(result).__name__
                )
                raise HookError(
                    f"the function on {name} gave {kind}; give a tensor of shape {tuple(value.shape)}, or None to keep "
                    "the value"
                )
            value = result.to(value)
        return value


class Keeping:
    """A visitor that calls the functions on hooks and keeps copies of the values of chosen hooks."""

    def __init__(
        self,
        functions: HookFunctions,
        wanted: Iterable[str],
        *,
        copy: Callable[[str, "torch.Tensor"], "torch.Tensor"],
        keep_graph: bool,
    ) -> None:
        """
        Args:
            functions: functions on the hooks of the model.
            wanted: names of the hooks whose values are kept.
            copy: takes (name, value) and returns the copy that is kept.
            keep_graph: keep the values themselves, so that gradients with respect to them can be asked for.
        """
        self.values: dict[str, torch.Tensor] = {}
        self._functions = functions
        self._wanted = frozenset(wanted)
        self._copy = copy
        self._keep_graph = keep_graph

    @property
    def names(self) -> frozenset[str]:
        """Names of all hooks that the forward must visit."""
        return self._wanted | frozenset(self._functions.names)

    def edits(self, name: str) -> bool:
        return name in self._functions or (self._keep_graph and name in self._wanted)

    def visit(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        if name in self._functions:
            value = self._functions.call(name, value)
        if name in self._wanted:
            same = self.values.get(stored_as(name))
            if self._keep_graph:
                # The very tensor that the forward goes on with, or nothing would flow back to it.
                self.values[name] = value
            elif same is not None and name not in self._functions:
                self.values[name] = same  # the stream out of the layer before is the stream into this one
            else:
                self.values[name] = self._copy(name, value)
        return value


def in_forward_order(values: Mapping[str, "torch.Tensor"], names: HookNames) -> dict[str, "torch.Tensor"]:
    """The same values in the order in which the model has their hooks."""
    return {name: values[name] for name in names.all if name in values}

"""Functions on hooks, and the visitor that calls them and keeps values."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.capture.exclusive import in_function
from actstore.hooks.capture.hook_point import (
    AddedFunction,
    Direction,
    HookFunction,
    HookPoint,
    check_direction,
)
from actstore.hooks.capture.inserted import Inserted, Visit
from actstore.hooks.capture.raw_calls import RawCalls
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.naming.names import HookName, HookNames, defaults_of, stored_as
from actstore.reason import reason

if TYPE_CHECKING:
    import torch


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
        self._functions: dict[str, list[AddedFunction]] = {}
        self._points: dict[str, HookPoint] = {}
        self._inserted: Mapping[str, Inserted] = {}

    def insert(self, inserted: Mapping[str, Inserted], names: HookNames) -> None:
        """Put these, and no others, into the forward.

        Args:
            inserted: what computes the value to go on with, by the name of its hook.
            names: all hooks, with those of what is inserted. Functions on other hooks are removed.
        """
        with self._changing:
            self._inserted, self._names = dict(inserted), names
            self._functions = {name: there for name, there in self._functions.items() if name in names}
            self._points = {name: point for name, point in self._points.items() if name in names}
            self._watch()

    def _watch(self) -> None:
        """Refuse direct calls of the model while there is anything that they would skip."""
        if self._functions or self._inserted:
            self._raw_calls.refuse()
        else:
            self._raw_calls.admit()

    @property
    def names_of_model(self) -> HookNames:
        """All hooks of the model."""
        return self._names

    def point(self, name: HookName) -> HookPoint:
        """The hook of this name, in any spelling; functions on it get the same object.

        Raises:
            HookError: the model does not have it.
        """
        canonical = self._names.one(name)
        return self._points.setdefault(canonical, HookPoint(canonical, self))

    def add(
        self,
        chosen: NameFilter,
        function: HookFunction,
        *,
        direction: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> tuple[str, ...]:
        """Add a function to hooks and return their names. Functions on one hook are called in the order of adding.

        Args:
            chosen: the hooks.
            function: the function.
            direction: whether the function sees values or gradients.
            is_permanent: whether `remove` leaves it unless told otherwise.
            level: a number by which `remove` finds it.
            prepend: call it before the functions that are there already.
        """
        if not callable(function):
            raise HookError(f"expected a function to add to {quoted(chosen)}, found {quoted(function)}")
        check_direction(direction)
        if direction != "fwd":
            raise HookError(
                "functions on gradients (dir='bwd') are not offered; run_with_cache(grad=True) and cache.gradients "
                "give the gradients"
            )
        names = selected(self._names, chosen)
        added = AddedFunction(function, is_permanent, level)
        with self._changing:
            for name in names:
                there = self._functions.setdefault(name, [])
                there.insert(0 if prepend else len(there), added)
            self._watch()
        return names

    def on(self, name: str, direction: Direction) -> list[AddedFunction]:
        """The functions on a hook, in the order in which they are called."""
        return list(self._functions.get(name, ())) if direction == "fwd" else []

    def remove(
        self,
        names: Sequence[str] | None = None,
        *,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove functions from these hooks, or from all.

        Args:
            names: canonical names; None for all hooks.
            direction: ``fwd``, ``bwd`` or ``both``: which functions.
            including_permanent: remove all functions, whatever their level.
            level: remove only functions of this level; None for those of any.
        """
        check_direction(direction)
        if direction == "bwd":
            return
        with self._changing:
            for name in tuple(self._functions) if names is None else names:
                kept = [
                    function
                    for function in self._functions.pop(name, ())
                    if not including_permanent
                    and (function.is_permanent or level not in (None, function.context_level))
                ]
                if kept:
                    self._functions[name] = kept
            self._watch()

    def clear_contexts(self) -> None:
        """Forget what all functions kept in ``hook.ctx``."""
        for point in tuple(self._points.values()):
            point.clear_context()

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
                self._watch()

    def _remove(self, name: str, function: HookFunction) -> None:
        """Remove a function from a hook, the last one if it is there several times; `clear` may have removed it."""
        functions = self._functions.get(name, [])
        for index in reversed(range(len(functions))):
            if functions[index].user_hook is function:
                del functions[index]
                break
        if not functions:
            self._functions.pop(name, None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hooks whose values a function, or what is inserted, may change."""
        return (*self._functions, *(name for name in self._inserted if name not in self._functions))

    def __contains__(self, name: object) -> bool:
        return name in self._functions or name in self._inserted

    def replaced(self, name: str, value: "torch.Tensor", visit: Visit) -> "torch.Tensor":
        """The value after the functions of a hook and what is inserted there, whose own hooks are visited."""
        value = self.call(name, value)
        inserted = self._inserted.get(name)
        return value if inserted is None else inserted(name, value, visit)

    def call(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        """The value after all functions of a hook.

        Raises:
            HookError: a function cannot be called so, or returns anything but None or a tensor of the same shape.
        """
        import torch

        point = self.point(name)
        for function in self.on(name, "fwd"):
            try:
                with in_function():
                    result: Any = function.user_hook(value, hook=point)
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
            value = self._functions.replaced(name, value, self.visit)
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

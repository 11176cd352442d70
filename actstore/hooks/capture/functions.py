"""The functions on the hooks of a model, and which hooks they are on."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from actstore.errors import HookError
from actstore.hooks.capture.backward import with_functions_for_gradient
from actstore.hooks.capture.calling import called
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
from actstore.hooks.naming.hook_points import is_for_each_head, is_read_only
from actstore.hooks.naming.names import HookName, HookNames, defaults_of, split

if TYPE_CHECKING:
    import torch


NameFilter = HookName | Iterable[HookName] | Callable[[str], bool]
"""Names or globs in any spelling, or a function that takes a canonical name and says yes or no."""

HookPairs = Sequence[tuple[NameFilter, HookFunction]]
"""Functions, each with the hooks that it is to be added to."""


def selected(names: HookNames, chosen: NameFilter, *, is_exact: bool = False) -> tuple[str, ...]:
    """The canonical names that a filter selects, in the order of the forward.

    A function that says yes to every hook selects only those captured by default, from which the others are computed;
    with ``is_exact`` it selects every hook. Copies of the stream for each head (``hook_q_input``) are selected by a
    function that selects nothing else, or after `HookedModel.set_use_split_qkv_input` and `set_use_attn_in`.

    Raises:
        HookError: a name or glob matches nothing, or the function says no to every hook.
    """
    if chosen is None or isinstance(chosen, int | float):
        raise HookError(f"expected names of hooks or a function of the name, found {quoted(chosen)}")
    if callable(chosen):
        matches = {name for name in names.all if chosen(name)}
        if not matches:
            raise HookError("the function that filters hooks says no to every hook of this model")
        is_default = len(matches) == len(names.all)
        copies = {name for name in matches if is_for_each_head(name)}
        if is_default or copies != matches:
            matches -= {name for name in copies if is_default or split(name)[1] not in names.switched_on()}
        is_default = is_default and not is_exact
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
        self._functions: Mapping[Direction, dict[str, list[AddedFunction]]] = {"fwd": {}, "bwd": {}}
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
            for functions in self._functions.values():
                for name in set(functions).difference(names):
                    del functions[name]
            self._points = {name: point for name, point in self._points.items() if name in names}
            self._watch()

    def _watch(self) -> None:
        """Refuse direct calls of the model while there is anything that they would skip."""
        if self:
            self._raw_calls.refuse()
        else:
            self._raw_calls.admit()

    def __bool__(self) -> bool:
        """Whether there are functions of any direction, or anything is inserted."""
        return bool(self._inserted) or any(self._functions.values())

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
        check_direction(direction, is_one=True)
        names = self._chosen(chosen, direction)
        self._put(direction, names, AddedFunction(function, is_permanent, level), prepend=prepend)
        return names

    def _chosen(self, chosen: NameFilter, direction: Direction) -> tuple[str, ...]:
        """The hooks to add a function to: for gradients, only those that have one."""
        names = selected(self._names, chosen)
        if direction == "fwd":
            return names
        changeable = tuple(name for name in names if not is_read_only(name))
        if not changeable:
            raise HookError(f"{names[0]} has no gradient: it can be read but not changed")
        return changeable

    def _put(
        self, direction: Direction, names: Sequence[str], added: AddedFunction, *, prepend: bool = False
    ) -> None:
        with self._changing:
            for name in names:
                there = self._functions[direction].setdefault(name, [])
                there.insert(0 if prepend else len(there), added)
            self._watch()

    def on(self, name: str, direction: Direction) -> list[AddedFunction]:
        """The functions on a hook, in the order in which they are called."""
        return list(self._functions[direction].get(name, ()))

    def remove(
        self,
        names: Sequence[str] | None = None,
        *,
        direction: Direction | Literal["both"] = "both",
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

        def stays(function: AddedFunction) -> bool:
            return not including_permanent and (
                function.is_permanent or level not in (None, function.context_level)
            )

        with self._changing:
            for functions in (
                self._functions.values() if direction == "both" else [self._functions[direction]]
            ):
                for name in tuple(functions) if names is None else names:
                    kept = [function for function in functions.pop(name, ()) if stays(function)]
                    if kept:
                        functions[name] = kept
            self._watch()

    def clear_contexts(self) -> None:
        """Forget what all functions kept in ``hook.ctx``."""
        for point in tuple(self._points.values()):
            point.clear_context()

    @contextmanager
    def added(
        self,
        fwd_pairs: HookPairs,
        bwd_pairs: HookPairs = (),
        *,
        stay: bool = False,
        clear_contexts: bool = False,
    ) -> Iterator[None]:
        """Add functions for the duration of a context. Functions that were added before stay.

        Args:
            fwd_pairs: hooks and functions of their values.
            bwd_pairs: hooks and functions of their gradients.
            stay: leave the functions there at the end.
            clear_contexts: when functions are removed, forget what was kept in ``hook.ctx`` of their hooks.
        """
        # All are checked before the first is added.
        added: list[tuple[Direction, tuple[str, ...], AddedFunction]] = [
            *(("fwd", self._chosen(chosen, "fwd"), function) for chosen, function in _checked(fwd_pairs)),
            *(("bwd", self._chosen(chosen, "bwd"), function) for chosen, function in _checked(bwd_pairs)),
        ]
        for direction, names, function in added:
            self._put(direction, names, function)
        try:
            yield
        finally:
            for direction, names, function in () if stay else added:
                self._take(direction, names, function)
                for name in names if clear_contexts else ():
                    self.point(name).clear_context()

    def _take(self, direction: Direction, names: Sequence[str], added: AddedFunction) -> None:
        """Remove one function from hooks, unless `remove` has done so."""
        functions = self._functions[direction]
        with self._changing:
            for name in names:
                kept = [function for function in functions.pop(name, ()) if function is not added]
                if kept:
                    functions[name] = kept
            self._watch()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hooks whose values a function, or what is inserted, may change."""
        return tuple(dict.fromkeys([*self._functions["fwd"], *self._inserted]))

    @property
    def names_for_gradients(self) -> tuple[str, ...]:
        """Names of the hooks with functions of their gradients."""
        return tuple(self._functions["bwd"])

    def __contains__(self, name: object) -> bool:
        """Whether a function, or what is inserted, may change the value of a hook."""
        return name in self._functions["fwd"] or name in self._inserted

    def replaced(self, name: str, value: "torch.Tensor", visit: Visit) -> "torch.Tensor":
        """The value after the functions of a hook and what is inserted there, whose own hooks are visited.

        In a graph, functions of its gradient are called when that is computed.
        """
        backward = self.on(name, "bwd")
        if backward:
            functions = [function.user_hook for function in backward]
            value = with_functions_for_gradient(
                functions, self.point(name), value, forward=lambda value: self.call(name, value)
            )
        else:
            value = self.call(name, value)
        inserted = self._inserted.get(name)
        return value if inserted is None else inserted(name, value, visit)

    def call(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        """The value after all functions of a hook.

        Raises:
            HookError: a function cannot be called so, or returns anything but None or a tensor of the same shape.
        """
        for function in self.on(name, "fwd"):
            with in_function():
                result = called(function.user_hook, self.point(name), value)
            value = value if result is None else result
        return value


def _checked(pairs: HookPairs) -> Iterator[tuple[NameFilter, AddedFunction]]:
    """The same pairs, with functions to be added.

    Raises:
        HookError: they are no pairs of names and functions.
    """
    if not isinstance(pairs, Iterable):
        raise HookError(f"expected pairs of (name, function), found {quoted(pairs)}")
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not callable(pair[1]):
            raise HookError(f"expected pairs of (name, function), found {quoted(pair)}")
        chosen, function = pair
        yield chosen, AddedFunction(function)

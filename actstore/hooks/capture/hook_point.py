"""One hook of a model: its name, the functions on it, and a place for what they keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from actstore.errors import HookError
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.naming.names import layer_of

if TYPE_CHECKING:
    import torch

Direction = Literal["fwd", "bwd"]
"""Whether a function sees the values of a hook, or their gradients."""


class HookFunction(Protocol):
    """A function that is called as ``function(value, hook=point)``.

    It returns a new value, or None to keep the value, which it may have edited in place.
    """

    def __call__(self, value: "torch.Tensor", /, *, hook: "HookPoint") -> "torch.Tensor | None": ...


@dataclass(frozen=True)
class AddedFunction:
    """A function on a hook, with what TransformerLens' ``LensHandle`` says of it."""

    user_hook: HookFunction
    """The function as it was given."""
    is_permanent: bool = False
    """Whether it stays when the others are removed."""
    context_level: int | None = None
    """The number that it was given, by which it can be removed; None for no number."""


class Functions(Protocol):
    """The functions on the hooks of a model, as one hook needs them."""

    def add(
        self,
        chosen: str,
        function: HookFunction,
        *,
        direction: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> tuple[str, ...]: ...

    def remove(
        self,
        names: Sequence[str],
        *,
        direction: Direction | Literal["both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None: ...

    def on(self, name: str, direction: Direction) -> list[AddedFunction]: ...


class HookPoint:
    """One hook: ``model.blocks[3].attn.hook_z``, ``model.hook_dict["hook_embed"]``, and what functions get as ``hook``.

    Arguments and attributes are those of TransformerLens.
    """

    def __init__(self, name: str, functions: Functions) -> None:
        """
        Args:
            name: canonical name.
            functions: the functions on the hooks of the model.
        """
        self.name = name
        self.ctx: dict[str, Any] = {}
        """A place for values of functions, kept from call to call until `clear_context` or `HookedModel.reset_hooks`.
        """
        self._functions = functions

    def layer(self) -> int:
        """The layer of the hook.

        Raises:
            HookError: the hook is outside of layers.
        """
        number = layer_of(self.name)
        if number is None:
            raise HookError(f"{self.name} is outside of the layers")
        return number

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",  # noqa: A002 - name of TransformerLens
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a function; see `HookedModel.add_hook`."""
        self._functions.add(
            self.name, hook, direction=dir, is_permanent=is_permanent, level=level, prepend=prepend
        )

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> None:  # noqa: A002
        """Add a function that stays until permanent ones are removed."""
        self.add_hook(hook, dir, is_permanent=True)

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",  # noqa: A002
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove the functions on this hook; arguments are those of `HookedModel.reset_hooks`."""
        self._functions.remove(
            (self.name,), direction=dir, including_permanent=including_permanent, level=level
        )

    @property
    def fwd_hooks(self) -> list[AddedFunction]:
        """The functions on its values, in the order in which they are called."""
        return self._functions.on(self.name, "fwd")

    @property
    def bwd_hooks(self) -> list[AddedFunction]:
        """The functions on its gradients."""
        return self._functions.on(self.name, "bwd")

    def has_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "both",  # noqa: A002
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Whether there are functions, of a direction and a level if given."""
        check_direction(dir)
        functions = (self.fwd_hooks if dir != "bwd" else []) + (self.bwd_hooks if dir != "fwd" else [])
        return any(
            (including_permanent or not function.is_permanent) and level in (None, function.context_level)
            for function in functions
        )

    def clear_context(self) -> None:
        """Forget what functions kept in ``ctx``."""
        self.ctx = {}

    def __repr__(self) -> str:
        counts = [
            f"{len(these)} {kind}"
            for kind, these in (("fwd", self.fwd_hooks), ("bwd", self.bwd_hooks))
            if these
        ]
        return f"HookPoint({', '.join([f'name={self.name!r}', *counts])})"


def check_direction(direction: object, *, is_one: bool = False) -> None:
    """Refuse a direction that is none.

    Args:
        direction: the direction.
        is_one: refuse ``both``, too.

    Raises:
        HookError: it is not ``fwd``, ``bwd`` or ``both``.
    """
    if direction not in (("fwd", "bwd") if is_one else ("fwd", "bwd", "both")):
        raise HookError(f"dir is {quoted(direction)}; choose 'fwd' for values or 'bwd' for gradients")

"""Functions on hooks that see gradients on their way back, and may change them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from actstore.hooks.capture.calling import called
from actstore.hooks.capture.hook_point import HookFunction, HookPoint

if TYPE_CHECKING:
    import torch


def with_functions_for_gradient(
    functions: Sequence[HookFunction],
    point: HookPoint,
    value: "torch.Tensor",
    forward: "Callable[[torch.Tensor], torch.Tensor]",
) -> "torch.Tensor":
    """The value of a hook after the functions of the forward, with functions of its gradient attached.

    Each gets the gradient with respect to the value that the forward goes on with. What the last one gives that gives
    something goes further back in place of it, past the functions of the forward, as in TransformerLens.

    Args:
        functions: the functions of the gradient, called when it is computed.
        point: the hook.
        value: its value. Without a graph, or for integers, nothing is attached.
        forward: calls the functions of the forward.
    """
    import torch

    if not torch.is_grad_enabled() or not value.is_floating_point():
        return forward(value)
    replaced: list[torch.Tensor] = []

    def see(gradient: "torch.Tensor") -> None:
        seen = gradient.clone()
        replaced.clear()
        for function in functions:
            version = seen._version
            result = called(_unpacked(function), point, seen)
            if result is None and seen._version != version:
                result = seen
            if result is not None:
                replaced[:] = [result]

    def replace(gradient: "torch.Tensor") -> "torch.Tensor":
        return replaced.pop() if replaced else gradient

    # A tensor of its own, so that no other use of the value, nor another hook at it, is replaced as well.
    own = value.view_as(value)
    after = forward(own.clone())
    # A value from elsewhere has no past, but what follows has a gradient with respect to it.
    after = after.view_as(after) if after.requires_grad else after.detach().requires_grad_()
    after.register_hook(see)  # type: ignore[no-untyped-call]
    if own.requires_grad:
        own.register_hook(replace)  # type: ignore[no-untyped-call]
    return after


def _unpacked(function: HookFunction) -> HookFunction:
    """The same function; where it gives a tuple of one, as PyTorch's own hooks do, what is in it."""

    def unpacked(value: "torch.Tensor", /, *, hook: HookPoint) -> Any:
        result: Any = function(value, hook=hook)
        return result[0] if isinstance(result, tuple) and len(result) == 1 else result

    return unpacked

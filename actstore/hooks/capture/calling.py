"""A call of a function on a hook, and what it may give."""

from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.capture.hook_point import HookFunction, HookPoint
from actstore.reason import reason

if TYPE_CHECKING:
    import torch


def called(function: HookFunction, point: HookPoint, value: "torch.Tensor") -> "torch.Tensor | None":
    """What a function gives for a value, in the dtype of the value; None if it gives none.

    Raises:
        HookError: the function cannot be called so, or returns anything but None or a tensor of the same shape.
    """
    import torch

    try:
        result: Any = function(value, hook=point)
    except TypeError as error:
        if "hook" not in str(error) or "argument" not in str(error):
            raise
        raise HookError(
            f"the function on {point.name} cannot be called as function(value, hook=point): {reason(error)}"
        ) from error
    if result is None:
        return None
    if not isinstance(result, torch.Tensor) or result.shape != value.shape:
        kind = f"shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise HookError(
            f"the function on {point.name} gave {kind}; give a tensor of shape {tuple(value.shape)}, or None to keep "
            "the value"
        )
    return result.to(value)

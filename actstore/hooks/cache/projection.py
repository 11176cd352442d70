"""Projecting parts of the residual stream onto directions."""

from typing import TYPE_CHECKING

from actstore.errors import HookError
from actstore.hooks.cache.derived import together
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch


def projected(stack: "torch.Tensor", onto: "torch.Tensor | None") -> "torch.Tensor":
    """The products of parts [..., d_model] with a direction [d_model] or several [d_model, n]; None for the parts."""
    if onto is None:
        return stack
    stack, onto = together(stack, onto)
    return stack @ onto


def check_directions(onto: "torch.Tensor | None", d_model: int) -> None:
    """Refuse what are no directions.

    Raises:
        HookError: the shape is not [d_model] or [d_model, n].
    """
    shape = getattr(onto, "shape", None)
    if onto is not None and (shape is None or len(shape) not in (1, 2) or shape[0] != d_model):
        raise HookError(
            f"project_output_onto is {quoted(onto)}; give a direction [{d_model}] or several [{d_model}, n]"
        )

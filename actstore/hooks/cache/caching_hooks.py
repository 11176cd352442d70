"""Keeping values and gradients by functions on hooks, and by one pass backward."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.cache.position import PositionSlice, at_positions, keeping_axis
from actstore.hooks.capture.hook_point import HookFunction, HookPoint
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.naming.hook_points import position_axis

if TYPE_CHECKING:
    import torch


def caching_hooks(
    names: Sequence[str],
    cache: "dict[str, torch.Tensor]",
    *,
    suffix: str = "",
    device: "str | torch.device | None",
    remove_batch_dim: bool,
    pos_slice: PositionSlice,
) -> list[tuple[str, HookFunction]]:
    """Pairs of names and functions that keep what passes in a dictionary.

    Args:
        names: canonical names.
        cache: the dictionary; a later value takes the place of an earlier one.
        suffix: what follows the name in the dictionary.
        device: where values are kept; None for where they are.
        remove_batch_dim: keep values of a single row without their batch axis.
        pos_slice: positions to keep, as `HookedModel.run_with_cache` takes them; None for all.
    """

    def keep(value: "torch.Tensor", *, hook: HookPoint) -> None:
        axis = position_axis(hook.name)
        kept = at_positions(value.detach(), keeping_axis(pos_slice, value.shape[axis]), axis=axis)
        if remove_batch_dim:
            if len(kept) != 1:
                raise HookError(f"remove_batch_dim needs one row, and there are {len(kept)}")
            kept = kept[0]
        cache[hook.name + suffix] = kept.clone() if device is None else kept.to(device, copy=True)

    return [(name, keep) for name in names]


def backward(output: Any, values: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Call ``backward()`` on an output, and give the gradients with respect to the values of hooks.

    Args:
        output: one number.
        values: values in its graph; those that have no gradient are left out.

    Raises:
        HookError: the output is not one number.
    """
    import torch

    if not isinstance(output, torch.Tensor) or output.numel() != 1:
        raise HookError(
            f"incl_bwd needs an output of one number, found {quoted(output)}; choose return_type='loss'"
        )
    graded = {name: value for name, value in values.items() if value.requires_grad}
    for value in graded.values():
        value.retain_grad()
    output.backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in graded.items() if value.grad is not None}

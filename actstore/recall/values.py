"""Stored values in the shape of a cache of prompts."""

from typing import TYPE_CHECKING

from actstore.hooks.naming.hook_points import point_of

if TYPE_CHECKING:
    import torch


def as_cached(hook: str, value: "torch.Tensor", longest: int) -> "torch.Tensor":
    """Values [prompt, position, *shape] of a stored hook as `HookedModel.run_with_cache` has them, with as many
    positions, and sources of patterns, as the longest prompt has.
    """
    point = point_of(hook)
    assert point is not None  # it is stored
    value = value[:, :longest]
    if "source_position" in point.axes:
        value = value[..., :longest]
    return value.contiguous().movedim(1, point.position_axis)

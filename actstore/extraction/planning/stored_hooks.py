"""Choosing the hooks that a store will hold, with their shapes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actstore.errors import HookError
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.families.model_names import hooks_of
from actstore.hooks.naming.hook_points import point_of
from actstore.hooks.naming.names import HookNames, stored_as
from actstore.store.format.plan import HookArray

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def stored_hooks(
    config: "PretrainedConfig", patterns: Sequence[str], context_length: int
) -> tuple[HookArray, ...]:
    """The arrays that the patterns select in a model of this configuration, in the order of the forward.

    Raises:
        ModelError: the family is not known.
        HookError: a pattern selects nothing, or only what a store cannot hold.
    """
    names, cfg = hooks_of(config)
    return selected_hooks(names, cfg, patterns, context_length)


def selected_hooks(
    names: HookNames, cfg: HookedConfig, patterns: Sequence[str], context_length: int
) -> tuple[HookArray, ...]:
    """The same for a model with these names and sizes."""
    chosen: set[str] = set()
    for pattern in patterns:
        matches = names.select(pattern)
        reasons = [_reason(name) for name in matches]
        if all(reasons):
            raise HookError(f"hook {pattern!r} cannot be stored: {reasons[0]}")
        chosen |= {stored_as(name) for name, reason in zip(matches, reasons, strict=True) if not reason}
    arrays = []
    for name in names.all:
        point = point_of(name)
        if name in chosen and point is not None:
            arrays.append(
                HookArray(name=name, shape=cfg.shape(point, context_length), axes=point.axes_in_store)
            )
    return tuple(arrays)


def _reason(name: str) -> str | None:
    point = point_of(name)
    return None if point is None else point.why_not_stored

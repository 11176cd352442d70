"""The axes of a grid, whose sizes follow from the model and the length of the prompts.

To add an axis, add it here, to `cells_of` and the labels in `actstore.patching.grid`, and in `actstore.patching.engine`
to `cells` and to the edits of `sweep` and `whole_rows`. A function for one hook and its axes is a line in
`actstore.patching.transformer_lens_functions`.
"""

from collections.abc import Sequence
from typing import Final

from actstore.errors import HookError, PatchError
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.naming.hook_points import BY_LEAF
from actstore.hooks.naming.names import HookNames, split
from actstore.patching.engine.cells import PATTERNS

POSITIONS: Final = ("pos", "dest_pos")
"""Axes of the positions whose values are replaced."""
HEADS: Final = ("head", "head_index")
NEURON: Final = "neuron"


def leaf_of(names: HookNames, hook: str) -> str:
    """The leaf of a hook that is given in shorthand, such as ``z``, or as a leaf, such as ``ln1.hook_scale``.

    Raises:
        HookError: the model does not have it, it cannot be changed, or it is outside of the layers.
    """
    point = BY_LEAF.get(hook)
    if point is not None and not point.in_layer:
        raise HookError(f"{hook} is outside of the layers, and a grid patches hooks of every layer")
    _, leaf = split(names.one((hook, 0) if point is None else f"blocks.0.{hook}"))
    if BY_LEAF[leaf].is_read_only:
        raise HookError(f"{leaf} can be read but not changed; patch the input or the output of the MLP")
    return leaf


def sizes_of(cfg: HookedConfig, leaf: str, axes: Sequence[str], length: int) -> list[int]:
    """The size of each axis of a grid over prompts of ``length`` tokens.

    Raises:
        PatchError: the hook does not have such axes.
    """
    own = BY_LEAF[leaf].axes
    allowed = {"layer": cfg.n_layers, "pos": length, "dest_pos": length}
    if {"head", "kv_head"} & set(own):
        allowed |= dict.fromkeys(HEADS, cfg.n_key_value_heads if "kv_head" in own else cfg.n_heads)
    if leaf in PATTERNS:
        allowed["src_pos"] = length
    if "d_mlp" in own and cfg.d_mlp is not None:
        allowed[NEURON] = cfg.d_mlp
    wrong = [axis for axis in axes if axis not in allowed]
    if wrong or not axes or axes[0] != "layer" or len(set(axes)) != len(axes):
        raise PatchError(
            f"axes is {list(axes)}; give 'layer' first, then any of {', '.join(sorted(allowed.keys() - {'layer'}))}, "
            f"each once, for {leaf}"
        )
    for same in (POSITIONS, HEADS):
        if set(same) <= set(axes):
            raise PatchError(
                f"axes is {list(axes)}, and {same[0]} and {same[1]} are the same axis; give one of them"
            )
    return [allowed[axis] for axis in axes]

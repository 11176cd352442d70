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
from actstore.hooks.naming.names import HookNames, long_name, split
from actstore.patching.engine.cells import PATTERNS

POSITIONS: Final = ("pos", "dest_pos")
"""Axes of the positions whose values are replaced."""
HEADS: Final = ("head", "head_index")
NEURON: Final = "neuron"
_EVERY_LAYER: Final = "blocks.*."


def leaf_of(names: HookNames, hook: str) -> str:
    """The leaf of a hook of every layer.

    Args:
        names: the hooks of the model.
        hook: its shorthand, such as ``z``, its leaf, such as ``ln1.hook_scale``, or ``blocks.*.`` and the leaf.

    Raises:
        HookError: the model does not have it, it cannot be changed, it is outside of the layers, or it names one layer.
    """
    if not isinstance(hook, str):
        raise HookError(
            f"hook is {hook!r}; a grid patches a hook in every layer, so give its name, such as 'z'"
        )
    text = hook.removeprefix(_EVERY_LAYER)
    point = BY_LEAF.get(text)
    if point is not None and not point.in_layer:
        raise HookError(f"{hook} is outside of the layers, and a grid patches hooks of every layer")
    if text.startswith("blocks."):
        _, leaf = split(names.one(text))
        raise HookError(
            f"{hook} is the hook of one layer, and a grid patches every layer; give '{_EVERY_LAYER}{leaf}', and choose "
            "the row of that layer from the result"
        )
    in_first = long_name((text, 0), names.n_layers) if point is None else f"blocks.0.{text}"
    # All layers have the same hooks; a glob explains what is wrong without a layer that nobody has asked for.
    names.select(in_first.replace("blocks.0.", _EVERY_LAYER, 1))
    _, leaf = split(names.one(in_first))
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

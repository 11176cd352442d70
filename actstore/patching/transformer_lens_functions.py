"""The functions of ``transformer_lens.patching``: the same names, arguments and results, by an engine that is faster.

Each takes ``(model, corrupted_tokens, clean_cache, patching_metric)`` and returns a tensor with the metric of the
patched run in every cell. ``clean_cache`` may also be clean prompts, or the cache of a store. Keywords of
`actstore.patching.grid` are taken, too: ``positions=-1`` for a metric that looks at the last position only.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import PatchError
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import BY_LEAF
from actstore.patching.axes import leaf_of
from actstore.patching.engine.metric import Metric
from actstore.patching.grid import grid

if TYPE_CHECKING:
    import torch

PatchSetter = Callable[["torch.Tensor", Sequence[int], "torch.Tensor"], "torch.Tensor"]
"""Takes (corrupted value, index of the cell, clean value), and returns the value that goes on."""


@dataclass(frozen=True)
class ActPatch:
    """A function of TransformerLens for one kind of activation."""

    hook: str
    axes: tuple[str, ...]

    def __call__(
        self,
        model: HookedModel,
        corrupted_tokens: "torch.Tensor",
        clean_cache: Any,
        patching_metric: Metric,
        *,
        return_index_df: bool = False,
        **options: Any,
    ) -> Any:
        """Patch every cell; see `actstore.patching.grid` for arguments, options and errors.

        Args:
            return_index_df: return (values, table), where the table has the index of each cell in a row.

        Returns:
            float32 tensor with the axes of this function; an axis of prompts comes first if the metric gives a number
            for each prompt.
        """
        result = grid(model, corrupted_tokens, clean_cache, patching_metric, self.hook, self.axes, **options)
        values = result.values.to(model.device)
        return (
            (values, make_df_from_ranges(values.shape[-len(self.axes) :], self.axes))
            if return_index_df
            else values
        )


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """A table of all indices, the last column fastest. It needs pandas."""
    import pandas as pd

    return pd.DataFrame(list(itertools.product(*map(range, column_max_ranges))), columns=list(column_names))


def layer_pos_patch_setter(
    corrupted_activation: "torch.Tensor", index: Sequence[int], clean_activation: "torch.Tensor"
) -> "torch.Tensor":
    """Replace the value at a position; the index is [layer, pos]."""
    _, position = index
    corrupted_activation[:, position] = clean_activation[:, position]
    return corrupted_activation


def layer_pos_head_vector_patch_setter(
    corrupted_activation: "torch.Tensor", index: Sequence[int], clean_activation: "torch.Tensor"
) -> "torch.Tensor":
    """Replace the vector of a head at a position; the index is [layer, pos, head]."""
    _, position, head = index
    corrupted_activation[:, position, head] = clean_activation[:, position, head]
    return corrupted_activation


def layer_head_vector_patch_setter(
    corrupted_activation: "torch.Tensor", index: Sequence[int], clean_activation: "torch.Tensor"
) -> "torch.Tensor":
    """Replace the vectors of a head at all positions; the index is [layer, head]."""
    _, head = index
    corrupted_activation[:, :, head] = clean_activation[:, :, head]
    return corrupted_activation


def layer_head_pattern_patch_setter(
    corrupted_activation: "torch.Tensor", index: Sequence[int], clean_activation: "torch.Tensor"
) -> "torch.Tensor":
    """Replace the pattern of a head; the index is [layer, head]."""
    _, head = index
    corrupted_activation[:, head] = clean_activation[:, head]
    return corrupted_activation


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: "torch.Tensor", index: Sequence[int], clean_activation: "torch.Tensor"
) -> "torch.Tensor":
    """Replace the pattern of a head at a destination; the index is [layer, head, dest_pos]."""
    _, head, destination = index
    corrupted_activation[:, head, destination] = clean_activation[:, head, destination]
    return corrupted_activation


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: "torch.Tensor", index: Sequence[int], clean_activation: "torch.Tensor"
) -> "torch.Tensor":
    """Replace one weight of the pattern of a head; the index is [layer, head, dest_pos, src_pos]."""
    _, head, destination, source = index
    corrupted_activation[:, head, destination, source] = clean_activation[:, head, destination, source]
    return corrupted_activation


def generic_activation_patch(
    model: HookedModel,
    corrupted_tokens: "torch.Tensor",
    clean_cache: Any,
    patching_metric: Callable[["torch.Tensor"], Any],
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
) -> Any:
    """Patch with a function of your own: one forward for each cell, as TransformerLens does.

    Args:
        model: the model.
        corrupted_tokens: ids [batch, pos].
        clean_cache: values of the clean run.
        patching_metric: takes logits [batch, pos, d_vocab] and gives a number.
        patch_setter: takes (corrupted value, index, clean value) and returns the value that goes on.
        activation_name: the hook, in shorthand.
        index_axis_names: axes to go through; ``layer`` first.
        index_df: a table of the indices to go through instead; its first column is the layer.
        return_index_df: return (values, table).

    Returns:
        float32 tensor with the axes named, or [cell] for a table of indices.

    Raises:
        PatchError: not exactly one of ``index_axis_names`` and ``index_df`` is given, or an axis is not known.
    """
    import torch

    if (index_df is None) == (index_axis_names is None):
        raise PatchError(
            "give either index_axis_names, to go through whole axes, or index_df, with the indices"
        )
    shape: tuple[int, ...]
    if index_df is None:
        assert index_axis_names is not None
        is_shared = "kv_head" in BY_LEAF[leaf_of(model.names, activation_name)].axes
        n_heads = model.cfg.n_key_value_heads if is_shared else model.cfg.n_heads
        length = corrupted_tokens.shape[-1]
        sizes = {"layer": model.cfg.n_layers, **dict.fromkeys(("pos", "src_pos", "dest_pos"), length)}
        sizes |= dict.fromkeys(("head", "head_index"), n_heads)
        wrong = [axis for axis in index_axis_names if axis not in sizes]
        if wrong:
            raise PatchError(f"index_axis_names has {wrong[0]!r}; choose of {', '.join(sizes)}")
        shape = tuple(sizes[axis] for axis in index_axis_names)
        index_df = make_df_from_ranges(shape, index_axis_names)
    else:
        shape = (len(index_df),)
    values = []
    for index in index_df.to_numpy().tolist():
        name = model.names.one((activation_name, int(index[0])))
        clean = clean_cache[name]

        def patched(value: "torch.Tensor", hook: Any, index: list[int] = index, clean: Any = clean) -> Any:
            del hook
            return patch_setter(value, index, clean.to(value))

        logits = model.run_with_hooks(corrupted_tokens, fwd_hooks=[(name, patched)])
        values.append(float(patching_metric(logits)))
    result = torch.tensor(values, device=model.device).view(shape)
    return (result, index_df) if return_index_df else result


get_act_patch_resid_pre: Final = ActPatch("resid_pre", ("layer", "pos"))
get_act_patch_resid_mid: Final = ActPatch("resid_mid", ("layer", "pos"))
get_act_patch_resid_post: Final = ActPatch("resid_post", ("layer", "pos"))
get_act_patch_attn_out: Final = ActPatch("attn_out", ("layer", "pos"))
get_act_patch_mlp_out: Final = ActPatch("mlp_out", ("layer", "pos"))
get_act_patch_attn_head_out_by_pos: Final = ActPatch("z", ("layer", "pos", "head"))
get_act_patch_attn_head_q_by_pos: Final = ActPatch("q", ("layer", "pos", "head"))
get_act_patch_attn_head_k_by_pos: Final = ActPatch("k", ("layer", "pos", "head"))
get_act_patch_attn_head_v_by_pos: Final = ActPatch("v", ("layer", "pos", "head"))
get_act_patch_attn_head_pattern_by_pos: Final = ActPatch("pattern", ("layer", "head_index", "dest_pos"))
get_act_patch_attn_head_pattern_dest_src_pos: Final = ActPatch(
    "pattern", ("layer", "head_index", "dest_pos", "src_pos")
)
get_act_patch_attn_head_out_all_pos: Final = ActPatch("z", ("layer", "head"))
get_act_patch_attn_head_q_all_pos: Final = ActPatch("q", ("layer", "head"))
get_act_patch_attn_head_k_all_pos: Final = ActPatch("k", ("layer", "head"))
get_act_patch_attn_head_v_all_pos: Final = ActPatch("v", ("layer", "head"))
get_act_patch_attn_head_pattern_all_pos: Final = ActPatch("pattern", ("layer", "head_index"))


def get_act_patch_attn_head_all_pos_every(
    model: HookedModel, corrupted_tokens: "torch.Tensor", clean_cache: Any, metric: Metric, **options: Any
) -> "torch.Tensor":
    """Patch output, query, key, value and pattern of every head at all positions [5, layer, head].

    Keys and values have one head for each group of query heads; the rest of their rows is 0, as in TransformerLens.
    """
    import torch

    functions = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    results = [function(model, corrupted_tokens, clean_cache, metric, **options) for function in functions]
    return torch.stack([_filled(values, model.cfg.n_heads) for values in results])


def get_act_patch_attn_head_by_pos_every(
    model: HookedModel, corrupted_tokens: "torch.Tensor", clean_cache: Any, metric: Metric, **options: Any
) -> "torch.Tensor":
    """Patch output, query, key, value and pattern of every head at each position [5, layer, pos, head].

    Keys and values have one head for each group of query heads; the rest of their rows is 0, as in TransformerLens.
    """
    import torch

    functions = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
    )
    results = [function(model, corrupted_tokens, clean_cache, metric, **options) for function in functions]
    patterns = get_act_patch_attn_head_pattern_by_pos(model, corrupted_tokens, clean_cache, metric, **options)
    return torch.stack(
        [*(_filled(values, model.cfg.n_heads) for values in results), patterns.transpose(-1, -2)]
    )


def get_act_patch_block_every(
    model: HookedModel, corrupted_tokens: "torch.Tensor", clean_cache: Any, metric: Metric, **options: Any
) -> "torch.Tensor":
    """Patch the stream into each layer, and the outputs of its attention and of its MLP [3, layer, pos]."""
    import torch

    functions = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack(
        [function(model, corrupted_tokens, clean_cache, metric, **options) for function in functions]
    )


def _filled(values: "torch.Tensor", n_heads: int) -> "torch.Tensor":
    """Values [..., head] filled up with 0 to a number of heads."""
    import torch

    return torch.nn.functional.pad(values, (0, n_heads - values.shape[-1]))

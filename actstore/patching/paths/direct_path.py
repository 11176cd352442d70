"""Direct paths between heads, with the names, arguments and results of ``transformer_lens.patching``."""

from typing import TYPE_CHECKING, Any

from actstore.errors import PatchError
from actstore.hooks.model import HookedModel
from actstore.patching.engine.metric import Metric
from actstore.patching.paths.nodes import Component
from actstore.patching.paths.path_patch import path_patch

if TYPE_CHECKING:
    import torch


def get_act_patch_direct_path(
    model: HookedModel,
    corrupted_tokens: "torch.Tensor",
    clean_cache: Any,
    corrupted_cache: Any,
    patching_metric: Metric,
    src_layer: int,
    src_head: int,
    component: Component = "q",
    verbose: bool = True,
    **options: Any,
) -> "torch.Tensor":
    """Patch what one head writes into queries, keys or values of each later head alone.

    The clean value of the head is added in place of its corrupted one at every position of the stream that the other
    head reads; every other reader sees the corrupted one.

    Args:
        model: the model.
        corrupted_tokens: ids [batch, pos].
        clean_cache: values of the clean run, with ``attn.hook_z`` of the layer; or clean prompts.
        corrupted_cache: taken from TransformerLens; the corrupted run is computed.
        patching_metric: takes logits and gives a number.
        src_layer: layer of the head.
        src_head: its number.
        component: what is patched in the later heads: ``q``, ``k`` or ``v``.
        verbose: taken from TransformerLens; give ``progress`` to see progress.
        options: keywords of `actstore.patching.path_patch`.

    Returns:
        float32 [layer, head]. Layers up to that of the head are 0, which is no measurement. With grouped queries, keys
        and values have one head for each group; TransformerLens refuses these.

    Raises:
        PatchError: the head is not in the model, the metric gives a number for each prompt, or ``component`` is
            another one. See `actstore.patching.path_patch` for the rest.
    """
    del corrupted_cache, verbose
    result = _patched(
        model, corrupted_tokens, clean_cache, patching_metric, [(src_layer, src_head)], component, options
    )
    return _later(result[None, None], [src_layer], model)[0, 0]


def get_act_patch_direct_path_all_sources(
    model: HookedModel,
    corrupted_tokens: "torch.Tensor",
    clean_cache: Any,
    corrupted_cache: Any,
    patching_metric: Metric,
    component: Component = "q",
    verbose: bool = True,
    **options: Any,
) -> "torch.Tensor":
    """`get_act_patch_direct_path` from every head.

    Returns:
        float32 [layer, head, later layer, its head], with 0 where the second layer is not later.
    """
    del corrupted_cache, verbose
    result = _patched(model, corrupted_tokens, clean_cache, patching_metric, "heads", component, options)
    return _later(result, range(model.cfg.n_layers), model)


def _patched(
    model: HookedModel,
    tokens: "torch.Tensor",
    clean: Any,
    metric: Metric,
    senders: Any,
    component: Component,
    options: dict[str, Any],
) -> "torch.Tensor":
    """The metric of all paths to one component [..., layer, head]."""
    if component not in ("q", "k", "v"):
        raise PatchError(f"component is {component!r}; choose 'q', 'k' or 'v'")
    result = path_patch(model, tokens, clean, metric, senders, component, **options)
    if result.corrupted.ndim:
        raise PatchError(
            "the metric gives a number for each prompt; let it give one for all, or call path_patch"
        )
    cfg = model.cfg
    n_heads = cfg.n_heads if component == "q" else cfg.n_key_value_heads
    shape = (cfg.n_layers, cfg.n_heads) if senders == "heads" else ()
    return result.values.to(model.device).reshape(*shape, cfg.n_layers, n_heads)


def _later(values: "torch.Tensor", layers: Any, model: HookedModel) -> "torch.Tensor":
    """Values [layer, head, other layer, its head] with 0 where the other layer is not later."""
    import torch

    earlier = torch.tensor(list(layers))[:, None] >= torch.arange(model.cfg.n_layers)
    return values.masked_fill(earlier[:, None, :, None].to(values.device), 0.0)

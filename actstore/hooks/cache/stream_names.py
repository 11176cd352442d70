"""Places where the residual stream is read, and the names of the hooks there."""

from typing import NamedTuple

from actstore.errors import HookError
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.naming.names import HookNames, join


class Place(NamedTuple):
    """A place where a norm and what follows it read the residual stream."""

    layer: int
    """The layer, from 0 to the last; the number of layers stands for the unembedding."""
    mlp_input: bool = False
    """Whether it is the MLP of the layer that reads, and not its attention."""


def place_before(names: HookNames, cfg: HookedConfig, layer: int | None, mlp_input: bool = False) -> Place:
    """The place before a layer, where None and -1 stand for the unembedding.

    Raises:
        HookError: there is no such layer, or its MLP has no stream of its own.
    """
    n_layers = cfg.n_layers
    number = n_layers if layer is None or layer == -1 else layer
    if not 0 <= number <= n_layers:
        raise HookError(f"layer is {layer}; give 0 to {n_layers}, which (as None or -1) is the unembedding")
    if mlp_input and number == n_layers:
        raise HookError(f"mlp_input needs the layer of an MLP, 0 to {n_layers - 1}; layer is {layer}")
    if mlp_input:
        names.one(join(number, "hook_resid_mid"))
    return Place(number, mlp_input)


def scale_hook(names: HookNames, cfg: HookedConfig, place: Place) -> str:
    """The hook of the scale of the norm at a place.

    Raises:
        HookError: the model has no norm there.
    """
    is_final = place.layer == cfg.n_layers
    norm = "ln_final" if is_final else f"blocks.{place.layer}.ln{2 if place.mlp_input else 1}"
    return names.one(f"{norm}.hook_scale")


def stream_into(layer: int) -> str:
    """The hook of the residual stream into a layer, or into the unembedding."""
    return join(layer - 1, "hook_resid_post") if layer else join(0, "hook_resid_pre")


def embedding_hooks(names: HookNames) -> list[tuple[str, str]]:
    """(label, hook) of each embedding that the model has."""
    hooks = [("embed", "hook_embed"), ("pos_embed", "hook_pos_embed")]
    return [(label, name) for label, name in hooks if name in names]


def stream_hooks(names: HookNames, cfg: HookedConfig, place: Place, incl_mid: bool) -> list[tuple[str, str]]:
    """(label, hook) of the stream into each layer up to a place.

    Args:
        names: hooks of the model.
        cfg: its sizes.
        place: the place of the last stream.
        incl_mid: include the streams between attention and MLP.

    Raises:
        HookError: the model has no stream between attention and MLP.
    """
    end = place.layer
    parts: list[tuple[str, str]] = []
    for index in range(min(end + 1, cfg.n_layers)):
        parts.append((f"{index}_pre", join(index, "hook_resid_pre")))
        if (incl_mid and index < end) or (place.mlp_input and index == end):
            parts.append((f"{index}_mid", names.one(join(index, "hook_resid_mid"))))
    if end == cfg.n_layers:
        parts.append(("final_post", join(end - 1, "hook_resid_post")))
    return parts


def output_hooks(names: HookNames, place: Place, *, attn: bool, mlp: bool) -> list[tuple[str, str]]:
    """(label, hook) of what attention and MLPs add to the stream before a place."""
    parts: list[tuple[str, str]] = []
    for index in range(place.layer):
        for what, is_included in (("attn", attn), ("mlp", mlp)):
            if is_included:
                parts.append((f"{index}_{what}_out", names.one(join(index, f"hook_{what}_out"))))
    if place.mlp_input and attn:
        parts.append((f"{place.layer}_attn_out", join(place.layer, "hook_attn_out")))
    return parts

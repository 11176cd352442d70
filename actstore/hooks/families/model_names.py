"""The hook names of one model, with the spellings of the Bridge and of Hugging Face."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actstore.hooks.families.architectures import Architecture
from actstore.hooks.families.config import SHARED_KEYS, HookedConfig
from actstore.hooks.families.recognition import architecture
from actstore.hooks.families.site import AnySite, Site, sites_in_layer, sites_outside
from actstore.hooks.naming.hook_points import BY_LEAF, POINTS
from actstore.hooks.naming.names import HookNames, join, leaves_in_order


def hooks_of(config: Any) -> tuple[HookNames, HookedConfig]:
    """Hook names and sizes of a model, from its Hugging Face configuration alone.

    Raises:
        ModelError: models like this cannot be hooked.
    """
    family = architecture(config)
    cfg = HookedConfig.of(config, family)
    return names_of(family, cfg), cfg


def names_of(architecture: Architecture, cfg: HookedConfig) -> HookNames:
    """The names of all hooks of a model of this family and these sizes."""
    outside = sites_outside(architecture)
    in_layers = [sites_in_layer(architecture, cfg, layer) for layer in range(cfg.n_layers)]
    first = [point.leaf for point in POINTS if point.leaf in ("hook_embed", "hook_pos_embed")]
    last = [point.leaf for point in POINTS if not point.in_layer and point.leaf not in first]
    names = [leaf for leaf in first if leaf in outside]
    for layer, sites in enumerate(in_layers):
        names += [join(layer, leaf) for leaf in leaves_in_order() if leaf in sites]
    names += [leaf for leaf in last if leaf in outside]
    undefined = dict(architecture.undefined_outside())
    for layer in range(cfg.n_layers):
        reasons = architecture.undefined(cfg.original, layer)
        undefined |= {join(layer, leaf): reason for leaf, reason in reasons.items()}
        if cfg.n_heads != cfg.n_key_value_heads:
            undefined.setdefault(join(layer, "hook_attn_in"), SHARED_KEYS)
    aliases = dict(_bridge(architecture, cfg, names)) | dict(_hugging_face(architecture, outside, in_layers))
    known = set(names)
    return HookNames(
        names,
        n_layers=cfg.n_layers,
        aliases={alias: name for alias, name in aliases.items() if name in known},
        undefined=undefined,
        switched_on=cfg.switched_on,
    )


def _bridge(architecture: Architecture, cfg: HookedConfig, names: list[str]) -> Iterator[tuple[str, str]]:
    leaves = {alias: point.leaf for point in POINTS for alias in point.aliases} | dict(architecture.aliases())
    for alias, leaf in leaves.items():
        if BY_LEAF[leaf].in_layer:
            yield from ((join(layer, alias), join(layer, leaf)) for layer in range(cfg.n_layers))
        elif leaf in names:
            yield alias, leaf


def _hugging_face(
    architecture: Architecture, outside: Mapping[str, AnySite], in_layers: Sequence[Mapping[str, AnySite]]
) -> Iterator[tuple[str, str]]:
    """The path of each module whose output is exactly the value of a hook, with the name of that hook."""

    def spellings(path: str, name: str) -> Iterator[tuple[str, str]]:
        yield path, name
        yield f"{architecture.prefix}.{path}", name

    for leaf, site in outside.items():
        if isinstance(site, Site) and site.side == "output":
            yield from spellings(site.module, leaf)
    for layer, sites in enumerate(in_layers):
        root = f"{architecture.layers}.{layer}"
        for leaf, site in sites.items():
            is_whole = isinstance(site, Site) and site.part.columns is None and site.part.of_three is None
            if isinstance(site, Site) and is_whole and site.side == "output":
                path = f"{root}.{site.module}" if site.module else root
                yield from spellings(path, join(layer, leaf))

"""Lists of hook names for people, who cannot read hundreds of them."""

from collections.abc import Callable, Iterable

from actstore.hooks.naming.names import join, split


def listing(names: Iterable[str], n_layers_with: Callable[[str], int]) -> str:
    """A short list of hook names: a glob for a hook of all layers, the ends of long runs.

    Args:
        names: canonical names, at least one.
        n_layers_with: gives the number of layers that have a leaf.
    """
    layers: dict[str, list[int | None]] = {}
    for name in names:
        layer, leaf = split(name)
        layers.setdefault(leaf, []).append(layer)
    parts: list[str] = []
    for leaf, its_layers in layers.items():
        its_names = [join(layer, leaf) for layer in its_layers]
        if 1 < len(its_layers) == n_layers_with(leaf):
            parts.append(f"blocks.*.{leaf}")
        elif len(its_layers) > 4:
            parts.append(f"{its_names[0]} ... {its_names[-1]} ({len(its_layers)} layers)")
        else:
            parts += its_names
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

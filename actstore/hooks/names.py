"""Hook names: from what users type to the canonical names of one model.

A name is TransformerLens' ``blocks.{layer}.{leaf}``, such as ``blocks.5.hook_resid_post``; ``*`` stands for any
text and ``?`` for any character.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import translate

from actstore.errors import HookError

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def layer_of(name: str) -> int:
    """The layer of a canonical name."""
    layer, _ = split(name)
    return layer


def split(name: str) -> tuple[int, str]:
    """``blocks.5.hook_resid_post`` as (5, ``hook_resid_post``).

    Raises:
        HookError: it is not such a name.
    """
    found = _BLOCK.fullmatch(name)
    if found is None:
        raise HookError(f"{name!r} is not a hook name; an example is blocks.5.hook_resid_post")
    return int(found[1]), found[2]


def canonical(name: str) -> str:
    """The name under which a value is stored: the stream into layer i is the stream out of layer i-1."""
    layer, leaf = split(name)
    if leaf == "hook_resid_pre" and layer > 0:
        return f"blocks.{layer - 1}.hook_resid_post"
    return name


def resolve(
    patterns: Sequence[str], *, n_layers: int, leaves: Sequence[str], undefined: Mapping[str, str]
) -> tuple[str, ...]:
    """The canonical names that the patterns select, in the order of the forward pass, each once.

    Args:
        patterns: names or globs.
        n_layers: layers of the model.
        leaves: hooks of each layer, in the order of the forward pass.
        undefined: hooks that this model does not have, with the reason.

    Raises:
        HookError: a pattern selects nothing; the message says why, or names what comes nearest.
    """
    names = [f"blocks.{layer}.{leaf}" for layer in range(n_layers) for leaf in leaves]
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in names if re.fullmatch(translate(pattern), name)]
        if not matches:
            raise HookError(_explain(pattern, names, n_layers=n_layers, undefined=undefined))
        chosen.update(canonical(name) for name in matches)
    return tuple(name for name in names if name in chosen)


def _explain(pattern: str, names: Sequence[str], *, n_layers: int, undefined: Mapping[str, str]) -> str:
    for leaf, reason in undefined.items():
        if any(re.fullmatch(translate(pattern), f"blocks.{layer}.{leaf}") for layer in range(n_layers)):
            return f"hook {pattern!r} does not exist in this model: {reason}"
    asked = _BLOCK.fullmatch(pattern)
    if asked and int(asked[1]) >= n_layers:
        return f"hook {pattern!r} matches nothing: this model has layers 0 to {n_layers - 1}"
    parts = re.fullmatch(r"blocks\.([^.]+)\.(.+)", pattern)
    layer, wanted = (parts[1], parts[2]) if parts else ("*", pattern)
    leaves = list(dict.fromkeys(split(name)[1] for name in names))
    nearest = [
        f"blocks.{layer}.{leaf}" for leaf in difflib.get_close_matches(wanted, leaves, n=2, cutoff=0.0)
    ]
    return (
        f"hook {pattern!r} matches nothing in this model; the nearest names are {' and '.join(nearest)}, and it has "
        f"{', '.join(leaves)}"
    )

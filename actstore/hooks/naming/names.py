"""Hook names: turning what users type into canonical names.

A canonical name is TransformerLens' ``blocks.{layer}.{leaf}``, such as ``blocks.5.hook_resid_post``, or stands alone
(``hook_embed``). Accepted as well are TransformerLens' shorthand (``("resid_post", 5)``, ``k6``), the names of its
Bridge (``blocks.5.hook_out``) and module paths of Hugging Face (``model.layers.5``, the output of that module).
In every string ``*`` stands for any text and ``?`` for any character; ``*`` between two dots stands for one part.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import translate
from typing import Any, Final

from actstore.errors import HookError
from actstore.hooks.naming.hook_points import BY_LEAF, POINTS, UNSUPPORTED, point_of

HookName = str | tuple[str, int] | tuple[str, int, str | None] | tuple[str, None]
"""A hook name in any spelling: text, or (name, layer), or (name, layer, part of the layer or None)."""

_GLOB: Final = "*?["
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_SHORT = re.compile(r"([a-z]+)(\d+)([a-z]?.*)")
_PARTS: Final = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
_LEAVES: Final = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_IN_ATTENTION: Final = {leaf.removeprefix("attn.hook_") for leaf in BY_LEAF if leaf.startswith("attn.")}
_IN_MLP: Final = {leaf.removeprefix("mlp.hook_") for leaf in BY_LEAF if leaf.startswith("mlp.")} | {"mid"}


def layer_of(name: str) -> int | None:
    """The layer of a canonical name; None for a hook outside of layers."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def split(name: str) -> tuple[int | None, str]:
    """``blocks.5.hook_resid_post`` as (5, ``hook_resid_post``), ``hook_embed`` as (None, ``hook_embed``)."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def join(layer: int | None, leaf: str) -> str:
    """The canonical name of a leaf in a layer, or outside of layers for None; the reverse of `split`."""
    return leaf if layer is None else f"blocks.{layer}.{leaf}"


def forward_order(name: str) -> tuple[float, int, str]:
    """A key that sorts canonical names into the order of the forward; an unknown leaf comes last in its layer."""
    layer, leaf = split(name)
    place = next((i for i, point in enumerate(POINTS) if point.leaf == leaf), len(POINTS))
    outside = math.inf if leaf.startswith("ln_final.") else -1
    return outside if layer is None else layer, place, name


def layers_needed(hooks: Sequence[str], n_layers: int) -> int:
    """How many of the first layers of a model a forward for these hooks runs."""
    if any(name.startswith("ln_final.") for name in hooks):
        return n_layers
    return 1 + max((layer for name in hooks if (layer := layer_of(name)) is not None), default=0)


def stored_as(name: str) -> str:
    """The name under which a value is stored: the stream into layer i is the stream out of layer i-1."""
    layer, leaf = split(name)
    return f"blocks.{layer - 1}.hook_resid_post" if leaf == "hook_resid_pre" and layer else name


def long_name(name: HookName, n_layers: int | None = None) -> str:
    """TransformerLens' shorthand written out; any other name is returned as it is.

    ``("resid_post", 5)``, ``("scale", 4, "ln1")``, ``k6``, ``pre5``, ``scale4ln1``; a negative layer counts from the
    end. The rules are those of TransformerLens' ``get_act_name``.

    Raises:
        HookError: this is no hook name; or its layer is negative, and the number of layers is unknown or too small.
    """
    text, layer, part = _parts_of(name)
    is_whole = "." in text or text.startswith("hook_") or any(sign in text for sign in _GLOB)
    if is_whole and layer is None and part is None:
        return text
    if layer is None:
        short = _SHORT.fullmatch(text)
        if short is not None:
            text, layer, part = short[1], int(short[2]), short[3] or part
    if layer is not None and layer < 0:
        if n_layers is None:
            raise HookError(f"the layer of {name!r} counts from the end; give it from the beginning here")
        if layer + n_layers < 0:
            raise HookError(
                f"the layer of {name!r} counts from the end of {n_layers} layers, and there are not so many"
            )
        layer += n_layers
    leaf = _LEAVES.get(text, text)
    if leaf in _IN_ATTENTION or leaf in _IN_MLP:
        part = "attn" if leaf in _IN_ATTENTION else "mlp"
    else:
        part = _PARTS.get(part, part) if part else ""
    if leaf in ("scale", "normalized") and layer is None:
        part = "ln_final"
    leaf = leaf if leaf.startswith("hook_") else f"hook_{leaf}"
    return join(layer, f"{part}.{leaf}" if part else leaf)


def _parts_of(name: HookName) -> tuple[str, int | None, str | None]:
    if isinstance(name, str):
        return name, None, None
    if not _is_tuple(name) or not all(isinstance(part, str | None) for part in name[2:]):
        raise HookError(f"{name!r} is not a hook; give a name, or a pair such as ('resid_post', 5)")
    layer = None if name[1] is None else operator.index(name[1])
    return name[0], layer, (name[2] if len(name) == 3 else None)


def _is_tuple(name: Any) -> bool:
    """Whether this is a name and a layer, which can be a tensor or an array of one integer."""
    if not (isinstance(name, tuple) and 2 <= len(name) <= 3 and isinstance(name[0], str)):
        return False
    layer = name[1]
    return layer is None or (
        hasattr(layer, "__index__") and getattr(layer, "ndim", 0) == 0 and _is_integer(layer)
    )


def _is_integer(given: Any) -> bool:
    try:
        operator.index(given)
    except TypeError:
        return False
    return True


class HookNames:
    """The hooks of one model: their canonical names, and what they are called elsewhere."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        n_layers: int,
        aliases: Mapping[str, str],
        undefined: Mapping[str, str],
        switched_on: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        """
        Args:
            names: canonical names in the order of the forward.
            n_layers: layers of the model.
            aliases: further spellings of whole names, to canonical names.
            undefined: names that this model does not have, with the reason.
            switched_on: gives the leaves of hooks for each head that a function of the name selects like all others.
        """
        self.all = tuple(names)
        self.n_layers = n_layers
        self._aliases = aliases
        self._undefined = undefined
        self.switched_on = switched_on
        self._order = {name: index for index, name in enumerate(self.all)}

    def extended(self, inner: Mapping[str, Sequence[str]]) -> "HookNames":
        """These hooks, with further ones below some of them.

        Args:
            inner: the last part of each further name, by the canonical name before it.
        """
        names = [
            name
            for outer in self.all
            for name in (outer, *(f"{outer}.{leaf}" for leaf in inner.get(outer, ())))
        ]
        below = {
            f"{alias}.{leaf}": f"{outer}.{leaf}"
            for alias, outer in self._aliases.items()
            for leaf in inner.get(outer, ())
        }
        return HookNames(
            names,
            n_layers=self.n_layers,
            aliases={**self._aliases, **below},
            undefined=self._undefined,
            switched_on=self.switched_on,
        )

    def __contains__(self, name: object) -> bool:
        return name in self._order

    def __iter__(self) -> Iterator[str]:
        return iter(self.all)

    def one(self, name: HookName) -> str:
        """The canonical name of one hook, in any spelling.

        Raises:
            HookError: this model does not have it; the message says why, or what comes nearest.
        """
        text = long_name(name, self.n_layers)
        canonical = text if text in self._order else self._aliases.get(text)
        if canonical is None:
            raise HookError(self._explain(name, text))
        return canonical

    def select(self, patterns: HookName | Iterable[HookName]) -> tuple[str, ...]:
        """The canonical names that the patterns select, in the order of the forward pass, each once.

        A glob selects what is captured by default; the rest must be named.

        Raises:
            HookError: a pattern selects nothing; the message says why, or names what comes nearest.
        """
        chosen: set[str] = set()
        for pattern in each_name(patterns):
            text = long_name(pattern, self.n_layers)
            matches = self._matches(text)
            if not matches:
                raise HookError(self._explain(pattern, text))
            chosen |= matches
        return self.ordered(chosen)

    def ordered(self, names: Iterable[str]) -> tuple[str, ...]:
        """These canonical names in the order of the forward."""
        return tuple(sorted(names, key=self._order.__getitem__))

    def before(self, layer: int) -> frozenset[str]:
        """Names of the hooks that a forward reaches if it ends before a layer."""
        return frozenset(
            name
            for name in self.all
            if ((number := layer_of(name)) is not None and number < layer)
            or (number is None and "final" not in name)
        )

    def _matches(self, text: str) -> set[str]:
        if text in self._order:
            return {text}
        if text in self._aliases:
            return {self._aliases[text]}
        if not any(sign in text for sign in _GLOB):
            return set()
        matches = _glob(text)
        names = {name for name in self.all if matches(name)}
        if not names:
            names = {name for alias, name in self._aliases.items() if matches(alias)}
        return defaults_of(names)

    def _explain(self, given: object, text: str) -> str:
        matches = _glob(text)
        for name, reason in self._undefined.items():
            if matches(name):
                return f"hook {given!r} does not exist in this model: {reason}"
        layer, leaf = split(text)
        from_end = re.fullmatch(r"blocks\.-(\d+)\.(.+)", text)
        if from_end:
            short = from_end[2].rsplit(".", 1)[-1].removeprefix("hook_")
            return f"hook {given!r} matches nothing; counted from the end it is ({short!r}, -{from_end[1]})"
        if leaf in UNSUPPORTED:
            return f"hook {given!r} is not offered: {UNSUPPORTED[leaf]}"
        if layer is not None and layer >= self.n_layers:
            return f"hook {given!r} matches nothing: this model has layers 0 to {self.n_layers - 1}"
        if leaf in BY_LEAF and (layer is None) == BY_LEAF[leaf].in_layer:
            example = join(0 if BY_LEAF[leaf].in_layer else None, leaf)
            everywhere = (
                f", and in all layers {join(0, leaf).replace('0', '*', 1)}" if BY_LEAF[leaf].in_layer else ""
            )
            return f"hook {given!r} matches nothing; its name is {example}{everywhere}"
        return f"hook {given!r} matches nothing in this model; the nearest names are {self._nearest(text)}"

    def _nearest(self, text: str) -> str:
        parts = re.fullmatch(r"blocks\.([^.]+)\.(.+)", text)
        layer, wanted = (parts[1], parts[2]) if parts else ("*", text)
        leaves = list(dict.fromkeys(split(name)[1] for name in self.all))
        # The end of a path says more than its beginning: `attn.hook_resid_post` is near `hook_resid_post`.
        near = difflib.get_close_matches(wanted, leaves, n=3, cutoff=0.6) or difflib.get_close_matches(
            wanted.rsplit(".", 1)[-1], leaves, n=3, cutoff=0.0
        )
        outside = {point.leaf for point in POINTS if not point.in_layer}
        return " and ".join(leaf if leaf in outside else f"blocks.{layer}.{leaf}" for leaf in near)


def _glob(pattern: str) -> Callable[[str], object]:
    """A function that matches names with a glob, in which ``*`` between two dots is one part of a name.

    So ``blocks.*.hook_out`` does not match ``blocks.0.ln1.hook_out``.
    """
    first, *parts = pattern.split(".")
    inner = ["[^.]+" if part == "*" else _regex(part) for part in parts[:-1]]
    last = [_regex(part) for part in parts[-1:]]
    return re.compile(r"\.".join([_regex(first), *inner, *last])).fullmatch


def _regex(glob: str) -> str:
    return translate(glob).removesuffix(r"\Z")


def defaults_of(names: set[str]) -> set[str]:
    """The names that are captured by default; all names, if none is."""
    defaults = {name for name in names if (point := point_of(name)) is None or point.is_default}
    return defaults or names


def each_name(patterns: Any) -> list[HookName]:
    """One or several names as a list. A tuple is one name if its second item is a layer, else several names."""
    if isinstance(patterns, str):
        return [patterns]
    return [patterns] if _is_tuple(patterns) else list(patterns)


def leaves_in_order() -> tuple[str, ...]:
    """The leaves of a layer in the order of the forward."""
    return tuple(point.leaf for point in POINTS if point.in_layer)

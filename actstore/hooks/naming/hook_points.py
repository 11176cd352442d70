"""A table of hook points: TransformerLens' names, the shape of each value, and what it means.

A name is ``blocks.{layer}.{leaf}`` or stands alone (``hook_embed``). Values have the axes ``batch`` and ``position``
first, except where a point says otherwise. The order of the table is that of the forward pass.

To add a hook point, add it here, to `actstore.hooks.families.site`, which says where in a model its value is found, and
to docs/hooks.md. `actstore.hooks.families.architecture` names the points that a family lacks, and
`actstore.hooks.capture.taps` takes values that no module gives or returns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Point:
    """A kind of hook."""

    leaf: str
    """The name without its ``blocks.{i}.``."""
    axes: tuple[str, ...]
    """Axes after ``batch``. Sizes come from the model, except those of ``position`` and ``source_position``."""
    meaning: str
    aliases: tuple[str, ...] = ()
    """Spellings of TransformerLens' Bridge that mean the same in every family."""
    in_layer: bool = True
    is_default: bool = True
    """Whether the hook is captured when a glob, or no filter at all, selects every hook."""
    is_computed: bool = False
    """Whether the value is computed for the hook alone, so that no module holds the same memory."""
    is_read_only: bool = False
    """Whether functions can see the value but not change it; it has no gradient either."""
    why_not_stored: str | None = None
    """Why a store does not hold the value, which then exists only in a live run; None where stores hold it."""

    @property
    def position_axis(self) -> int:
        """Number of the axis of a value [batch, ...] that is the position."""
        return 1 + self.axes.index("position")

    @property
    def axes_in_store(self) -> tuple[str, ...]:
        """Axes of the value at one position; stores keep ``sequence`` and ``position`` in front of these."""
        return tuple(axis for axis in self.axes if axis != "position")


_STREAM = ("position", "d_model")
_QUERY = ("position", "head", "d_head")
_KEY = ("position", "kv_head", "d_head")
_PATTERN = ("head", "position", "source_position")
_NEURONS = ("position", "d_mlp")
_SCALE = ("position", "one")

POINTS: Final = (
    Point("hook_embed", _STREAM, "token embedding", ("embed.hook_out",), in_layer=False),
    Point("hook_pos_embed", _STREAM, "position embedding", ("pos_embed.hook_out",), in_layer=False),
    Point("hook_resid_pre", _STREAM, "residual stream into the layer", ("hook_in", "ln1.hook_in")),
    Point("ln1.hook_scale", _SCALE, "what the norm before attention divides by", is_computed=True),
    Point(
        "ln1.hook_normalized",
        _STREAM,
        "input of attention before gain and bias of its norm",
        is_computed=True,
    ),
    Point("ln1.hook_out", _STREAM, "input of attention"),
    Point("attn.hook_q", _QUERY, "queries, before any norm and rotation", ("attn.q.hook_out",)),
    Point("attn.hook_k", _KEY, "keys, before any norm and rotation", ("attn.k.hook_out",)),
    Point("attn.hook_v", _KEY, "values", ("attn.v.hook_out",)),
    Point("attn.hook_rot_q", _QUERY, "queries as attention takes them, normed and rotated"),
    Point("attn.hook_rot_k", _KEY, "keys as attention takes them, normed and rotated"),
    Point(
        "attn.hook_attn_scores", _PATTERN, "scaled logits of attention; -inf where masked", is_computed=True
    ),
    Point(
        "attn.hook_pattern",
        _PATTERN,
        "softmax of the scores; 0 in rows that are masked whole",
        is_computed=True,
    ),
    Point("attn.hook_z", _QUERY, "mix of values, before the output projection", ("attn.o.hook_in",)),
    Point(
        "attn.hook_result",
        ("position", "head", "d_model"),
        "what each head writes to the residual stream",
        is_default=False,
        is_computed=True,
        why_not_stored="it is d_model values for each head; store attn.hook_z, from which a cache computes it",
    ),
    Point("hook_attn_out", _STREAM, "what attention adds to the residual stream"),
    Point("hook_resid_mid", _STREAM, "residual stream between attention and MLP", ("ln2.hook_in",)),
    Point(
        "hook_mlp_in",
        _STREAM,
        "the residual stream as the MLP alone sees it, before its norm",
        is_default=False,
        why_not_stored="it equals hook_resid_mid; it is there to edit the input of the MLP alone",
    ),
    Point("ln2.hook_scale", _SCALE, "what the norm before the MLP divides by", is_computed=True),
    Point(
        "ln2.hook_normalized", _STREAM, "input of the MLP before gain and bias of its norm", is_computed=True
    ),
    Point("ln2.hook_out", _STREAM, "input of the MLP"),
    Point(
        "mlp.hook_expert_weights",
        ("position", "expert"),
        "probability of each expert, over all of them",
        is_computed=True,
        is_read_only=True,
    ),
    Point(
        "mlp.hook_expert_indices",
        ("position", "expert_choice"),
        "experts that are used, best first",
        is_read_only=True,
        why_not_stored="it holds integers, and a store has one floating-point dtype; store mlp.hook_expert_weights",
    ),
    Point("mlp.hook_pre", _NEURONS, "neurons before the activation function"),
    Point("mlp.hook_pre_linear", _NEURONS, "the factor of gated neurons"),
    Point("mlp.hook_post", _NEURONS, "neurons, the input of the last projection", ("mlp.out.hook_in",)),
    Point("hook_mlp_out", _STREAM, "what the MLP adds to the residual stream"),
    Point("hook_resid_post", _STREAM, "residual stream out of the layer", ("hook_out",)),
    Point("ln_final.hook_scale", _SCALE, "what the final norm divides by", in_layer=False, is_computed=True),
    Point(
        "ln_final.hook_normalized",
        _STREAM,
        "final residual stream, normed, before gain and bias",
        in_layer=False,
        is_computed=True,
    ),
)

BY_LEAF: Final[Mapping[str, Point]] = {point.leaf: point for point in POINTS}

UNSUPPORTED: Final[Mapping[str, str]] = dict.fromkeys(
    ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"),
    "it is a copy of the residual stream for each head; hook_resid_pre has the value, and attn.hook_q, attn.hook_k and "
    "attn.hook_v can be edited for each head",
) | {
    "hook_tokens": "token ids are `store.tokens`, and the input of a live forward",
    "unembed.hook_out": "logits are what a call of the model gives",
    "lm_head": "logits are what a call of the model gives",
}
"""Names of TransformerLens that actstore does not have, with the reason."""


def point_of(name: str) -> Point | None:
    """The hook point of a canonical name; None for any other text."""
    if name.startswith("blocks."):
        leaf = name.split(".", 2)[-1]
        point = BY_LEAF.get(leaf)
        return point if point is not None and point.in_layer else None
    point = BY_LEAF.get(name)
    return point if point is not None and not point.in_layer else None


def is_read_only(name: str) -> bool:
    """Whether functions on this hook can see the value but not change it."""
    point = point_of(name)
    return point is not None and point.is_read_only

"""A table of hook points: TransformerLens' names, the shape of each value, and what it means.

A name is ``blocks.{layer}.{leaf}`` or stands alone (``hook_embed``). Values have the axes ``batch`` and ``position``
first, except where a point says otherwise. The order of the table is that of the forward pass.

To add a hook point, add it here, to `actstore.hooks.families.site`, which says where in a model its value is found,
and to docs/hooks.md and schemas/format.md, whose tables a test compares with this one.
`actstore.hooks.families.architectures` names the points that a family lacks, and `actstore.hooks.capture.taps` takes
values that no module gives or returns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Reach = Literal["stream", "keys", "position"]
"""What of its own layer an edit reaches: the stream that the layer begins with; keys or values, and so all later
positions; or only the position that is edited.
"""


@dataclass(frozen=True)
class Point:
    """A kind of hook."""

    leaf: str
    """The name without its ``blocks.{i}.``."""
    axes: tuple[str, ...]
    """Axes after ``batch``. Sizes come from the model, except those of ``position`` and ``source_position``."""
    meaning: str
    """What the value is, as docs/hooks.md says it."""
    reach: Reach | None = field(kw_only=True)
    """What an edit reaches; None for hooks outside of layers, and those that cannot be edited."""
    aliases: tuple[str, ...] = ()
    """Spellings of TransformerLens' Bridge that mean the same in every family."""
    in_layer: bool = True
    is_default: bool = True
    """Whether the hook is captured when a glob, or no filter at all, selects every hook."""
    is_computed: bool = False
    """Whether the value is computed for the hook alone, so that no module holds the same memory."""
    is_read_only: bool = False
    """Whether functions can see the value but not change it; it has no gradient either."""
    is_for_each_head: bool = False
    """Whether the value is a copy of the stream for each head of attention, so that the input of one can be edited."""
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


def _for_each_head(leaf: str, head: str, meaning: str, reach: Reach) -> Point:
    """A copy of the stream for each head."""
    return Point(
        leaf,
        ("position", head, "d_model"),
        meaning,
        reach=reach,
        is_default=False,
        is_computed=True,
        is_for_each_head=True,
        why_not_stored="it is a copy of hook_resid_pre for each head; it is there to edit the input of one head alone",
    )


POINTS: Final = (
    Point(
        "hook_embed",
        _STREAM,
        "token embedding (Gemma: after its scaling)",
        ("embed.hook_out",),
        in_layer=False,
        reach=None,
    ),
    Point(
        "hook_pos_embed",
        _STREAM,
        "learned position embedding; absent where positions are rotations",
        ("pos_embed.hook_out",),
        in_layer=False,
        reach=None,
    ),
    Point(
        "hook_resid_pre",
        _STREAM,
        "residual stream into layer i; for i > 0 stored as `blocks.{i-1}.hook_resid_post`, the same tensor",
        ("hook_in", "ln1.hook_in"),
        reach="stream",
    ),
    _for_each_head("hook_attn_in", "head", "the stream as one head alone sees it, before its norm", "keys"),
    _for_each_head(
        "hook_q_input",
        "head",
        "the stream as the queries of one head alone see it, before their norm",
        "position",
    ),
    _for_each_head(
        "hook_k_input",
        "kv_head",
        "the stream as the keys of one head alone see it, before their norm",
        "keys",
    ),
    _for_each_head(
        "hook_v_input",
        "kv_head",
        "the stream as the values of one head alone see it, before their norm",
        "keys",
    ),
    Point(
        "ln1.hook_scale", _SCALE, "what the norm before attention divides by", is_computed=True, reach="keys"
    ),
    Point(
        "ln1.hook_normalized",
        _STREAM,
        "input of attention before gain and bias of its norm",
        is_computed=True,
        reach="keys",
    ),
    Point("ln1.hook_out", _STREAM, "what attention reads", reach="keys"),
    Point(
        "attn.hook_q", _QUERY, "queries, before any norm and rotation", ("attn.q.hook_out",), reach="position"
    ),
    Point(
        "attn.hook_k",
        _KEY,
        "keys, before any norm and rotation; not repeated for grouped queries",
        ("attn.k.hook_out",),
        reach="keys",
    ),
    Point(
        "attn.hook_v", _KEY, "values, not repeated for grouped queries", ("attn.v.hook_out",), reach="keys"
    ),
    Point(
        "attn.hook_rot_q",
        _QUERY,
        "queries as the attention function takes them: after norms and rotation",
        reach="position",
    ),
    Point(
        "attn.hook_rot_k",
        _KEY,
        "keys as the attention function takes them: after norms and rotation",
        reach="keys",
    ),
    Point(
        "attn.hook_attn_scores",
        _PATTERN,
        "scaled, softcapped scores; -inf where a position does not see the source",
        is_computed=True,
        reach="position",
    ),
    Point(
        "attn.hook_pattern",
        _PATTERN,
        "softmax of the scores, in float32; 0 in rows of padding",
        is_computed=True,
        reach="position",
    ),
    Point(
        "attn.hook_z",
        _QUERY,
        "mix of values, the input of the output projection",
        ("attn.o.hook_in",),
        reach="position",
    ),
    Point(
        "attn.hook_result",
        ("position", "head", "d_model"),
        "what each head writes; computed from z when it is named",
        is_default=False,
        is_computed=True,
        why_not_stored="it is d_model values for each head; store attn.hook_z, from which a cache computes it",
        reach="position",
    ),
    Point(
        "hook_attn_out",
        _STREAM,
        "what attention adds to the stream (Gemma 2 and 3: after the norm behind it)",
        reach="position",
    ),
    Point(
        "hook_resid_mid",
        _STREAM,
        "stream between attention and MLP; undefined where the two run in parallel",
        ("ln2.hook_in",),
        reach="position",
    ),
    Point(
        "hook_mlp_in",
        _STREAM,
        "the stream as the MLP alone sees it, before its norm",
        is_default=False,
        why_not_stored="it equals hook_resid_mid; it is there to edit the input of the MLP alone",
        reach="position",
    ),
    Point(
        "ln2.hook_scale",
        _SCALE,
        "what the norm before the MLP divides by",
        is_computed=True,
        reach="position",
    ),
    Point(
        "ln2.hook_normalized",
        _STREAM,
        "input of the MLP before gain and bias of its norm",
        is_computed=True,
        reach="position",
    ),
    Point("ln2.hook_out", _STREAM, "what the MLP reads", reach="position"),
    Point(
        "mlp.hook_expert_weights",
        ("position", "expert"),
        "probability of each expert, before the best are chosen",
        is_computed=True,
        is_read_only=True,
        reach=None,
    ),
    Point(
        "mlp.hook_expert_indices",
        ("position", "expert_choice"),
        "experts that are used, best first",
        is_read_only=True,
        why_not_stored="it holds integers, and a store has one floating-point dtype; store mlp.hook_expert_weights",
        reach=None,
    ),
    Point("mlp.hook_pre", _NEURONS, "neurons before the activation function", reach="position"),
    Point("mlp.hook_pre_linear", _NEURONS, "the linear factor of gated neurons", reach="position"),
    Point(
        "mlp.hook_post",
        _NEURONS,
        "neurons, the input of the last projection",
        ("mlp.out.hook_in",),
        reach="position",
    ),
    Point(
        "hook_mlp_out",
        _STREAM,
        "what the MLP adds to the stream (Gemma 2 and 3: after the norm behind it)",
        reach="position",
    ),
    Point(
        "hook_resid_post",
        _STREAM,
        "residual stream out of layer i, before any final norm",
        ("hook_out",),
        reach="position",
    ),
    Point(
        "ln_final.hook_scale",
        _SCALE,
        "what the final norm divides by",
        in_layer=False,
        is_computed=True,
        reach=None,
    ),
    Point(
        "ln_final.hook_normalized",
        _STREAM,
        "final residual stream, normed, before gain and bias",
        in_layer=False,
        is_computed=True,
        reach=None,
    ),
)

BY_LEAF: Final[Mapping[str, Point]] = {point.leaf: point for point in POINTS}

UNSUPPORTED: Final[Mapping[str, str]] = {
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


def position_axis(name: str) -> int:
    """The axis of positions in the value of a hook; hooks of SAEs are [batch, position, ...]."""
    point = point_of(name)
    return 1 if point is None else point.position_axis


def is_for_each_head(name: str) -> bool:
    """Whether the value of a hook is a copy of the stream for each head."""
    point = point_of(name)
    return point is not None and point.is_for_each_head


def is_read_only(name: str) -> bool:
    """Whether functions on this hook can see the value but not change it."""
    point = point_of(name)
    return point is not None and point.is_read_only

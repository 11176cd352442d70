"""A tap on the attention function: rotated queries and keys, and the scores and pattern that fused kernels never show.

transformers looks up the attention function of a model by name in a table. While a tap is open, the entry of the
implementation in use is a function that shows the values to a visitor and then calls the original. The name stays
the same, so that masks are made, and kernels chosen, exactly as without a tap.
"""

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.capture.exclusive import Turn
from actstore.hooks.capture.visitor import Visitor, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

Names = Mapping[str, str]
"""Hook names by the kind of value: ``rot_q``, ``rot_k``, ``scores``, ``pattern``."""

_lock = threading.Lock()
_taps: dict[int, tuple[Names, Visitor, Turn]] = {}
"""Open taps by the id of their attention module. Modules of other models, in any thread, are not touched."""


@contextlib.contextmanager
def tap(
    modules: Mapping["nn.Module", Names], visitor: Visitor, turn: Turn, *, is_scaled: bool = True
) -> Iterator[None]:
    """Show the visitor what passes the attention of these modules, until the context ends.

    Args:
        modules: attention modules, each with the names of the hooks that are wanted there.
        visitor: sees the values; ``rot_q``, ``rot_k`` as [batch, position, head, d_head], the other two as
            [batch, head, position, source_position].
        turn: the forward that is watched.
        is_scaled: whether modules with a method ``_attn`` divide scores by the root of d_head.
    """
    with contextlib.ExitStack() as stack:
        for module, names in modules.items():
            if hasattr(module, "_attn"):
                stack.enter_context(_wrapped_method(module, names, visitor, turn, is_scaled=is_scaled))
            else:
                stack.enter_context(_in_table(module))
                _taps[id(module)] = (names, visitor, turn)
                stack.callback(_taps.pop, id(module))
        yield


@contextlib.contextmanager
def _in_table(module: Any) -> Iterator[None]:
    """Put the tapping function into the table that this module reads.

    Raises:
        ModelError: the module reads no such table.
    """
    home = sys.modules[type(module).__module__]
    table = getattr(home, "ALL_ATTENTION_FUNCTIONS", None)
    if table is None:
        raise ModelError(
            f"attention of {type(module).__name__} does not go through transformers' AttentionInterface, so its "
            "scores and pattern cannot be hooked; load the model with attn_implementation='eager'"
        )
    kind = module.config._attn_implementation
    with _lock:
        entry = table._local_mapping.get(kind)
        if isinstance(entry, _Tapped):
            entry.users += 1
        else:
            # The eager function is no entry of the table but belongs to the file of the model.
            original = None if kind == "eager" else table[kind]
            table[kind] = entry = _Tapped(original, replaced=entry)
    try:
        yield
    finally:
        with _lock:
            entry.users -= 1
            if entry.users == 0:
                if entry.replaced is None:
                    del table[kind]
                else:
                    table[kind] = entry.replaced


class _Tapped:
    """The entry in the table while taps are open."""

    def __init__(self, original: Callable[..., Any] | None, replaced: Any) -> None:
        self.original = original
        self.replaced = replaced
        self.users = 1

    def __call__(
        self,
        module: "nn.Module",
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        attention_mask: "torch.Tensor | None",
        **kwargs: Any,
    ) -> Any:
        import torch

        original = self.original or sys.modules[type(module).__module__].eager_attention_forward
        tapping = _taps.get(id(module))
        if tapping is None or not tapping[2].is_passing():
            return original(module, query, key, value, attention_mask, **kwargs)
        names, visitor, _ = tapping
        query, key = _visit_rotated(names, visitor, query, key)
        if not names.keys() & {"scores", "pattern"}:
            return original(module, query, key, value, attention_mask, **kwargs)
        if not isinstance(attention_mask, torch.Tensor | None):
            raise ModelError(
                f"scores and patterns cannot be had from {module.config._attn_implementation}, whose mask is a "
                f"{type(attention_mask).__name__}; load the model with attention='sdpa' or 'eager'"
            )
        scaling = kwargs.get("scaling")
        rule = _Rule(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            window=kwargs.get("sliding_window"),
            sinks=kwargs.get("s_aux"),
            is_causal=kwargs.get("is_causal", getattr(module, "is_causal", True)),
            mask=attention_mask,
        )
        by_hand = _through(names, visitor, rule, query, key, value)
        return by_hand or original(module, query, key, value, attention_mask, **kwargs)


@contextlib.contextmanager
def _wrapped_method(
    module: Any, names: Names, visitor: Visitor, turn: Turn, *, is_scaled: bool
) -> Iterator[None]:
    """Tap modules of GPT-Neo and GPT-J, which compute attention in a method ``_attn``."""
    original = module._attn

    def tapped(query: Any, key: Any, value: Any, attention_mask: Any = None) -> Any:
        if not turn.is_passing():
            return original(query, key, value, attention_mask)
        query, key = _visit_rotated(names, visitor, query, key)
        local = getattr(module, "bias", None)  # GPT-Neo: which positions a local layer sees
        rule = _Rule(
            scaling=query.shape[-1] ** -0.5 if is_scaled else 1.0,
            is_causal=True,
            mask=attention_mask,
            local=None if local is None else local[:, :, : query.shape[-2], : key.shape[-2]],
        )
        by_hand = _through(names, visitor, rule, query, key, value)
        if by_hand is None:
            return original(query, key, value, attention_mask)
        out, pattern = by_hand
        return out.transpose(1, 2), pattern

    module._attn = tapped
    try:
        yield
    finally:
        del module._attn


class _Rule:
    """How scores become a pattern in one layer."""

    def __init__(
        self,
        *,
        scaling: float,
        is_causal: bool | None,
        mask: "torch.Tensor | None",
        softcap: float | None = None,
        window: int | None = None,
        sinks: "torch.Tensor | None" = None,
        local: "torch.Tensor | None" = None,
    ) -> None:
        self.scaling = scaling
        self.softcap = softcap
        self.window = window
        self.sinks = sinks
        self.is_causal = is_causal is not False
        self.mask = mask
        self.local = local

    def scores(self, query: "torch.Tensor", key: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """Scores, float32 [rows, head, position, source_position]; -inf where a position does not see the other."""
        query, key = query[rows].float(), key[rows].float()
        batch, n_heads, length, _ = query.shape
        groups = n_heads // key.shape[1]
        # Heads that share keys are positions to the product, so that keys are not repeated.
        shared = query.reshape(batch, key.shape[1], groups * length, -1)
        scores = (shared @ key.transpose(-1, -2)).view(batch, n_heads, length, -1) * self.scaling
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        hidden = self._hidden(rows, length, scores.shape[-1], scores.device)
        bias = self.mask
        if bias is not None and bias.dtype.is_floating_point and bias.ndim == 4:
            scores = scores + _of(bias, rows)[..., : scores.shape[-1]].float().clamp(min=-1e30)
        return scores if hidden is None else scores.masked_fill_(hidden, -math.inf)

    def _hidden(
        self, rows: slice, length: int, n_sources: int, device: "torch.device"
    ) -> "torch.Tensor | None":
        """True where a position does not see the other, [rows or 1, 1, position, source_position]."""
        import torch

        hidden: torch.Tensor | None = None
        if self.mask is None or self.mask.ndim == 2:
            # Without a full mask, the kernel gets is_causal and the window.
            ahead = torch.arange(n_sources, device=device) - torch.arange(length, device=device)[:, None]
            if self.is_causal:
                hidden = (ahead > 0)[None, None]
            if self.window is not None:
                outside = (ahead <= -self.window)[None, None]
                hidden = outside if hidden is None else hidden | outside
        if self.mask is not None:
            mask = _of(self.mask, rows)
            if mask.ndim == 2:
                masked = ~mask.bool()[:, None, None, :n_sources]
            elif mask.dtype.is_floating_point:
                masked = mask[..., :n_sources] <= torch.finfo(mask.dtype).min / 2
            else:
                masked = ~mask.bool()[..., :n_sources]
            hidden = masked if hidden is None else hidden | masked
        if self.local is not None:
            hidden = ~self.local if hidden is None else hidden | ~self.local
        return hidden

    def pattern(self, scores: "torch.Tensor") -> "torch.Tensor":
        """The pattern of scores, float32 of the same shape; rows of positions that see nothing are 0."""
        import torch

        scores = scores.float()
        if self.sinks is not None:
            # A sink is one more source, which takes its share of the weight and gives nothing.
            sinks = self.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        if self.mask is None:
            return torch.softmax(scores, dim=-1)
        # Only padding leaves a position with nothing to see; its softmax and gradient would be NaN.
        blind = scores.isneginf().all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)


def _of(mask: "torch.Tensor", rows: slice) -> "torch.Tensor":
    return mask if mask.shape[0] == 1 else mask[rows]


def _visit_rotated(
    names: Names, visitor: Visitor, query: "torch.Tensor", key: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    def visit(name: str, value: "torch.Tensor") -> "torch.Tensor":
        rows = value.transpose(1, 2)
        if visitor.edits(name) and torch.is_grad_enabled():
            rows = rows.clone()  # an edit in place must not reach what autograd has saved
        return visitor.visit(name, rows).transpose(1, 2)

    query = visit(names["rot_q"], query) if "rot_q" in names else query
    key = visit(names["rot_k"], key) if "rot_k" in names else key
    return query, key


def _through(
    names: Names,
    visitor: Visitor,
    rule: _Rule,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
) -> tuple["torch.Tensor", "torch.Tensor"] | None:
    """Show scores and pattern to the visitor, and compute attention from them if it changed them.

    Returns:
        (output, pattern); None if nothing was changed.
    """
    if not names.keys() & {"scores", "pattern"}:
        return None
    if not any(visitor.edits(names[what]) for what in ("scores", "pattern") if what in names):
        _show(names, visitor, rule, query, key)
        return None
    exact = rule.scores(query, key, slice(None))
    changed = False
    if "scores" in names:
        scores, changed = shown(visitor, names["scores"], exact.to(query.dtype, copy=True))
        exact = scores if changed else exact
    pattern = rule.pattern(exact).to(query.dtype)
    if "pattern" in names:
        pattern, is_other = shown(visitor, names["pattern"], pattern)
        changed = changed or is_other
    if not changed:
        return None
    groups = query.shape[1] // value.shape[1]
    out = pattern @ value.repeat_interleave(groups, dim=1)
    return out.transpose(1, 2).contiguous(), pattern


def _show(names: Names, visitor: Visitor, rule: _Rule, query: "torch.Tensor", key: "torch.Tensor") -> None:
    """Compute and show scores and pattern beside the fused kernel, row by row since float32 takes twice the memory."""
    import torch

    batch, n_heads, length, _ = query.shape
    shape = (batch, n_heads, length, key.shape[-2])
    kept = {
        what: torch.empty(shape, dtype=query.dtype, device=query.device)
        for what in ("scores", "pattern")
        if what in names
    }
    for row in range(batch):
        rows = slice(row, row + 1)
        scores = rule.scores(query, key, rows)
        if "scores" in kept:
            kept["scores"][rows] = scores
        if "pattern" in kept:
            kept["pattern"][rows] = rule.pattern(scores)
    for what, value in kept.items():
        visitor.visit(names[what], value)

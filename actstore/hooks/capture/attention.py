"""A tap on attention: rotated queries and keys, and the scores and pattern that fused kernels never show."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from actstore.hooks.capture.attention_calls import AttentionCall, Result, handled
from actstore.hooks.capture.attention_rule import AttentionRule
from actstore.hooks.capture.exclusive import Turn
from actstore.hooks.capture.visitor import Visitor, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

Names = Mapping[str, str]
"""Hook names by the kind of value: ``rot_q``, ``rot_k``, ``scores``, ``pattern``."""


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
    handlers = {module: partial(_watched, names, visitor) for module, names in modules.items()}
    with handled(handlers, turn, is_scaled=is_scaled):
        yield


def _watched(names: Names, visitor: Visitor, call: AttentionCall) -> Result:
    query, key = _visit_rotated(names, visitor, call.query, call.key)
    if names.keys() & {"scores", "pattern"}:
        by_hand = _through(names, visitor, call.rule(), query, key, call.value)
        if by_hand is not None:
            return by_hand
    return call.original(query, key, call.value)


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
    if "rot_k" not in names:
        return query, key
    # Keys from a cache are those of all positions so far; the new ones are shown.
    new = key[:, :, -query.shape[-2] :]
    edited = visit(names["rot_k"], new)
    if not visitor.edits(names["rot_k"]):
        return query, key
    if torch.is_grad_enabled():
        return query, edited
    # In place, so that the cache has them for later steps.
    new.copy_(edited)
    return query, key


def _through(
    names: Names,
    visitor: Visitor,
    rule: AttentionRule,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
) -> tuple["torch.Tensor", "torch.Tensor"] | None:
    """Show scores and pattern to the visitor, and compute attention from them if it changed them.

    Returns:
        (output, pattern); None if nothing was changed.
    """
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


def _show(
    names: Names, visitor: Visitor, rule: AttentionRule, query: "torch.Tensor", key: "torch.Tensor"
) -> None:
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

"""A store and its activations as HTML."""

from collections.abc import Sequence
from html import escape
from typing import Final

from actstore.store.format.plan import HookArray, Plan
from actstore.store.showing.html_table import html_table

_HOOKS: Final = 40
"""Hooks that are shown at most."""


def page_of_store(
    url: str,
    plan: Plan,
    arrays: Sequence[HookArray],
    *,
    shape: tuple[int, int],
    nbytes: int,
    n_tokens: int,
    state: str,
) -> str:
    """What a store holds: some facts about all of it, and a table of its hooks.

    Args:
        url: where it is.
        plan: plan of its first run.
        arrays: its hooks.
        shape: sequences and entries of each.
        nbytes: bytes of all shards.
        n_tokens: real tokens.
        state: how much of it is committed.
    """
    request, (n, width) = plan.request, shape
    unit = "positions" if plan.n_slots is None else f"slots ({request.tokens.positions})"
    facts = [
        ("model", request.model.name),
        ("tokens", f"{n_tokens:,} in {n:,} sequences of {plan.context_length:,}, {request.tokens.source}"),
        ("rows", f"{n:,} x {width:,} {unit}, {request.dtype}, {nbytes / 1e9:,.3g} GB"),
        ("state", state),
    ]
    hooks = [
        (array.name, " x ".join(map(str, array.shape)) or "1", " x ".join(array.axes))
        for array in arrays[:_HOOKS]
    ]
    more = f"<p>and {len(arrays) - _HOOKS:,} more hooks</p>" if len(arrays) > _HOOKS else ""
    title = f"<p><b>{escape(url)}</b></p>"
    return title + html_table(("", ""), facts) + html_table(("hook", "shape", "axes"), hooks) + more


def page_of_activations(hook: str, axes: Sequence[str], shape: Sequence[int], dtype: str, nbytes: int) -> str:
    """The shape of the activations of a hook, axis by axis."""
    sizes = [(axis, f"{size:,}") for axis, size in zip(axes, shape, strict=True)]
    about = f"<p><b>{escape(hook)}</b> {dtype}, {nbytes / 1e9:,.3g} GB</p>"
    return about + html_table(("axis", "size"), sizes)

"""A tap on the input of attention: a copy of the stream for each head, so that the input of one can be edited alone."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.capture.exclusive import Turn, in_function
from actstore.hooks.capture.visitor import Visitor, shown
from actstore.hooks.families.site import HeadInputSite, Site
from actstore.hooks.naming.names import join, split

if TYPE_CHECKING:
    import torch
    from torch import nn

_Edited = list[tuple[Site, list[int], "torch.Tensor"]]
"""(projection, its heads whose input is another, the inputs of these heads [batch, position, head, d_model])."""


@contextlib.contextmanager
def for_each_head(
    layer: "nn.Module", sites: Mapping[str, HeadInputSite], visitor: Visitor, turn: Turn
) -> Iterator[None]:
    """Show the visitor copies of the stream into a layer, until the context ends.

    Heads whose copy was edited get what the norm and the projection of the model give for it; the others keep theirs.

    Args:
        layer: the layer.
        sites: the wanted copies by the names of their hooks, in the order of the forward.
        visitor: sees the copies [batch, position, head, d_model].
        turn: the forward that is watched.

    Raises:
        HookError: the visitor edits values inside of the norm, too, which each head would have for itself; or both
            are to have gradients.
    """
    edited: _Edited = []
    streams: list[torch.Tensor] = []
    norm = layer.get_submodule(next(iter(sites.values())).norm)
    inside = [name for name in _in_norm(sites) if visitor.edits(name)]

    def before(_module: Any, args: Any) -> None:
        if turn.is_passing():
            streams[:] = [args[0]]
            edited[:] = _visited(sites, visitor, args[0])

    def after(path: str) -> Any:
        def project(module: "nn.Module", args: Any, output: "torch.Tensor") -> "torch.Tensor | None":
            own = [entry for entry in edited if entry[0].module == path]
            if not own or not turn.is_passing():
                return None
            with in_function():  # these calls are not part of the forward
                if inside:
                    _check_same(norm(streams[0]), args[0], inside[0], next(iter(sites)))
                return _projected(norm, module, output, own)

        return project

    with contextlib.ExitStack() as stack:
        # Edits of the stream are in the input of the norm.
        stack.callback(norm.register_forward_pre_hook(before).remove)
        for path in dict.fromkeys(site.module for copies in sites.values() for site in copies.projections):
            stack.callback(layer.get_submodule(path).register_forward_hook(after(path)).remove)
        yield


def _in_norm(sites: Mapping[str, HeadInputSite]) -> list[str]:
    """The hooks in the norm before attention of the layer that these sites are in."""
    layer, _ = split(next(iter(sites)))
    return [join(layer, f"ln1.{leaf}") for leaf in ("hook_scale", "hook_normalized", "hook_out")]


def _check_same(expected: "torch.Tensor", found: "torch.Tensor", inside: str, name: str) -> None:
    """Refuse edits of the norm before attention, which heads with an input of their own would not see."""
    import torch

    if torch.is_grad_enabled() or not torch.equal(expected.view(found.shape), found):
        raise HookError(
            f"{name} and {inside} cannot both be edited, or have gradients, in one forward: each head has a norm of "
            "its own then; leave one of them out"
        )


def _visited(sites: Mapping[str, HeadInputSite], visitor: Visitor, stream: "torch.Tensor") -> _Edited:
    """The heads of each projection whose copy of the stream [batch, position, d_model] was edited."""
    import torch

    inputs: dict[Site, tuple[torch.Tensor, set[int]]] = {}
    for name, site in sites.items():
        before = stream[..., None, :].expand(*stream.shape[:-1], site.n_heads, -1)
        for projection in site.projections:
            before = inputs[projection][0] if projection in inputs else before
        value, is_changed = shown(visitor, name, before.clone())
        if not is_changed:
            continue
        changed = list(range(site.n_heads))
        if not torch.is_grad_enabled():
            changed = (value != before).flatten(0, 1).any(-1).any(0).nonzero().flatten().tolist()
        for projection in site.projections:
            heads = inputs[projection][1] if projection in inputs else set()
            inputs[projection] = value, heads | set(changed)
    return [
        (projection, sorted(heads), value[..., sorted(heads), :])
        for projection, (value, heads) in inputs.items()
        if heads
    ]


def _projected(
    norm: "nn.Module", module: "nn.Module", output: "torch.Tensor", edited: _Edited
) -> "torch.Tensor":
    """The output of a projection, with other inputs for some heads."""
    import torch

    batch = edited[0][2].shape[0]
    out = output.clone().view(batch, -1, output.shape[-1])
    for site, heads, inputs in edited:
        # One call for all of these heads, which are rows of it.
        rows = inputs.movedim(2, 0).flatten(0, 1)
        projected = site.part.view(module(norm(rows)).view(len(rows), *out.shape[1:]))
        own = projected.view(len(heads), batch, *projected.shape[1:])
        for index, head in enumerate(heads):
            site.part.view(out)[..., head, :] = own[index, ..., head, :]
    new: torch.Tensor = out.view(output.shape)
    return new

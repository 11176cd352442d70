"""Taps on the sites of a model for one forward: PyTorch hooks, on the modules of these sites only."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.capture.attention import tap
from actstore.hooks.capture.exclusive import Turn
from actstore.hooks.capture.head_inputs import for_each_head
from actstore.hooks.capture.visitor import Visitor, shown
from actstore.hooks.families.architectures import Norm
from actstore.hooks.families.site import (
    AnySite,
    AttentionSite,
    HeadInputSite,
    NormSite,
    ResultSite,
    RouterSite,
    Site,
)
from actstore.hooks.weights.norms import eps_of, normalize
from actstore.hooks.weights.used_weights import norm as used_norm
from actstore.hooks.weights.used_weights import projection

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextlib.contextmanager
def tapped(
    sites: Mapping[str, tuple["nn.Module", AnySite]],
    visitor: Visitor,
    turn: Turn,
    *,
    batch: int,
    norm: Norm,
    is_scaled: bool,
) -> Iterator[None]:
    """Show the visitor the values at these sites; every PyTorch hook is removed when the context ends, however it ends.

    Args:
        sites: (module that the path of the site begins at, site) by hook, in the order of the forward.
        visitor: sees the values, [batch, position, ...].
        turn: the forward that is watched.
        batch: rows of the forward; some modules see rows and positions as one axis.
        norm: what the norms of this model compute.
        is_scaled: see `actstore.hooks.capture.attention.tap`.
    """
    taps: dict[tuple[nn.Module, str], list[tuple[str, Any]]] = {}
    attention: dict[nn.Module, dict[str, str]] = {}
    head_inputs: dict[nn.Module, dict[str, HeadInputSite]] = {}
    for name, (root, site) in sites.items():
        if isinstance(site, HeadInputSite):
            head_inputs.setdefault(root, {})[name] = site
            continue
        module = root.get_submodule(site.module)
        if isinstance(site, AttentionSite):
            attention.setdefault(module, {})[site.what] = name
        else:
            kind = site.side if isinstance(site, Site) else type(site).__name__
            taps.setdefault((module, kind), []).append((name, site))
    places = _Shown(visitor, turn, batch, norm)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tap(attention, visitor, turn, is_scaled=is_scaled))
        # They change the output of projections, which other taps see then.
        for layer, copies in head_inputs.items():
            stack.enter_context(for_each_head(layer, copies, visitor, turn))
        # Values inside of a module before its output, since edits of them change the output.
        for (module, kind), named_sites in sorted(taps.items(), key=lambda item: item[0][1] == "output"):
            stack.callback(places.register(module, kind, named_sites).remove)
        yield


class _Shown:
    """Translates between values as modules have them and as a visitor sees them."""

    def __init__(self, visitor: Visitor, turn: Turn, batch: int, norm: Norm) -> None:
        self._visitor = visitor
        self._turn = turn
        self._batch = batch
        self._norm = norm

    def register(self, module: "nn.Module", kind: str, named_sites: list[tuple[str, Any]]) -> Any:
        if kind == "input":

            def before(_module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if not self._turn.is_passing():
                    return None
                if not args:  # some layers are called with names
                    new = self._passing(kwargs["hidden_states"], named_sites)
                    return args, kwargs | {"hidden_states": new}
                return (self._passing(args[0], named_sites), *args[1:]), kwargs

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: "nn.Module", args: tuple[Any, ...], output: Any) -> Any:
            if not self._turn.is_passing():
                return None
            if kind == "output":
                # Attention modules and older layers return (value, weights).
                if isinstance(output, tuple):
                    return (self._passing(output[0], named_sites), *output[1:])
                return self._passing(output, named_sites)
            if kind == "NormSite":
                return self._in_norm(module, args[0], output, named_sites)
            if kind == "ResultSite":
                return self._in_projection(module, args[0], named_sites)
            return self._in_router(output, named_sites)

        return module.register_forward_hook(after)

    def _passing(self, value: "torch.Tensor", named_sites: list[tuple[str, Site]]) -> "torch.Tensor":
        import torch

        for name, site in named_sites:
            edits = self._visitor.edits(name)
            rows = self._rows(value)
            is_shared = rows.shape[0] != self._batch or site.is_apart or (site.in_place and rows is not value)
            # With a graph, an edit in place would reach what autograd has saved.
            if edits and (is_shared or torch.is_grad_enabled()):
                rows = rows.expand(self._batch, *rows.shape[1:]).clone()
            seen = site.part.view(rows)
            if seen.shape[0] != self._batch:  # position embeddings, the same in every row
                seen = seen.expand(self._batch, *seen.shape[1:])
            new = self._visitor.visit(name, seen)
            if new is value or not edits:
                continue
            changed = site.part.put(rows, new)
            if not site.in_place:
                value = changed.reshape(value.shape) if changed.numel() == value.numel() else changed
            elif changed is not rows or rows is not value:
                value.copy_(changed.reshape(value.shape))
        return value

    def _rows(self, value: "torch.Tensor") -> "torch.Tensor":
        """A value [batch * position, features] as [batch, position, features]; others stay as they are."""
        return value if value.ndim != 2 else value.view(self._batch, -1, value.shape[-1])

    def _in_norm(
        self,
        module: Any,
        value: "torch.Tensor",
        output: "torch.Tensor",
        named_sites: list[tuple[str, NormSite]],
    ) -> "torch.Tensor | None":
        import torch

        names = {site.what: name for name, site in named_sites}
        scale, normalized = normalize(self._rows(value), eps_of(module), norm=self._norm)
        is_same = scale.new_ones((), dtype=torch.bool)
        changed = False
        if "scale" in names:
            rounded, new, changed = self._shown(names["scale"], scale.to(value.dtype, copy=True))
            if changed:
                is_same = rounded == new
                normalized = normalized * scale / new.float()
        if "normalized" in names:
            rounded, normalized, is_other = self._shown(names["normalized"], normalized.to(value.dtype))
            if is_other:
                is_same = is_same & (rounded == normalized)
            changed = changed or is_other
        if not changed:
            return None
        used = used_norm(module)
        weight = used.weight.float()
        out = normalized.float() * (1.0 + weight if self._norm == "rms_plus_one" else weight)
        if getattr(used, "bias", None) is not None:
            out = out + used.bias.float()
        # Where nothing was changed, the output is that of the module, which rounded values would not give. Gradients
        # are those of what was shown everywhere.
        own = self._rows(output).float()
        out = torch.where(is_same, out + (own - out).detach(), out)
        new_value: torch.Tensor = out.to(value.dtype).reshape(value.shape)
        return new_value

    def _shown(self, name: str, value: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor, bool]":
        """(a value as it is shown, the value as the visitor leaves it, whether that may be another one)."""
        before = value.detach().clone() if self._visitor.edits(name) else value
        return before, *shown(self._visitor, name, value)

    def _in_projection(
        self, module: Any, z: "torch.Tensor", named_sites: list[tuple[str, ResultSite]]
    ) -> "torch.Tensor | None":
        import torch

        name, site = named_sites[0]
        per_head = z.view(*z.shape[:-1], site.n_heads, -1)
        weight = projection(module)
        weight = weight.view(site.n_heads, -1, weight.shape[-1])
        result, changed = shown(self._visitor, name, torch.einsum("bphe,hed->bphd", per_head, weight))
        if not changed:
            return None
        out = result.sum(-2)
        return out if module.bias is None else out + module.bias

    def _in_router(self, output: Any, named_sites: list[tuple[str, RouterSite]]) -> None:
        logits, _, indices = output
        for name, site in named_sites:
            value = logits.float().softmax(-1).to(logits.dtype) if site.what == "weights" else indices
            rows = self._rows(value).detach().clone()
            version = 0 if rows.is_inference() else rows._version
            is_same = self._visitor.visit(name, rows) is rows
            if not is_same or (not rows.is_inference() and rows._version != version):
                raise HookError(
                    f"{name} can be read but not changed; change the input or the output of the MLP"
                )

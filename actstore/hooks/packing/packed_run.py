"""A recorded forward, and layers of the model over rows that share its prefixes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import ModelError
from actstore.hooks.capture.attention_calls import AttentionCall, Result, handled
from actstore.hooks.capture.attention_rule import AttentionRule
from actstore.hooks.capture.exclusive import Turn, exclusive
from actstore.hooks.capture.forward import Forward
from actstore.hooks.capture.taps import tapped
from actstore.hooks.capture.visitor import Finished
from actstore.hooks.families.architectures import Architecture
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.families.site import AttentionSite, sites_in_layer
from actstore.hooks.packing.layer_arguments import LayerArguments

if TYPE_CHECKING:
    import torch
    from torch import nn

Edit = Callable[["torch.Tensor", int, slice], None]
"""Edits a value in place: ``edit(value, group, rows)``.

The values of most hooks come once, [token, ...] over all groups, with group 0. Scores and patterns come for some rows
of a group at a time, [row, head, position, source_position].
"""

_SOURCES_AT_ONCE: Final = 1 << 16
"""Source positions of rows that attend in one call: their keys and values are joined to those of the recorded run."""

_IN_ATTENTION: Final = {
    "attn.hook_rot_q": "rot_q",
    "attn.hook_rot_k": "rot_k",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
}


@dataclass(frozen=True)
class Group:
    """Rows over the same positions. Its tokens are packed row by row."""

    prompts: "torch.Tensor"
    """For each row, the number of the recorded prompt that it is a variant of [row]."""
    start: int
    """First position."""
    stop: int
    """Position behind the last one."""
    has_own_keys: bool
    """Whether the rows attend to their own keys and values from ``start`` on; otherwise to the recorded ones only."""
    known: "tuple[torch.Tensor, torch.Tensor] | None" = None
    """Own keys and values up to ``stop`` [row, kv_head, position, d_head], if they are known before."""

    @property
    def n_rows(self) -> int:
        return len(self.prompts)

    @property
    def n_positions(self) -> int:
        return self.stop - self.start

    @property
    def n_tokens(self) -> int:
        return self.n_rows * self.n_positions


class PackedRun:
    """One forward over prompts [prompt, position], recorded, from which variants of its rows are computed.

    Positions before the first one of a row are taken from the recording: their keys and values are shared by all rows.
    """

    def __init__(
        self,
        forward: Forward,
        architecture: Architecture,
        cfg: HookedConfig,
        tokens: "torch.Tensor",
        turn: Turn,
    ) -> None:
        """
        Args:
            forward: the model.
            architecture: the paths of its parts.
            cfg: its sizes.
            tokens: ids [prompt, position].
            turn: the turn that this thread holds as long as the run is used.
        """
        self.streams: list[torch.Tensor] = []
        """Residual stream into each layer, and out of the last [prompt, position, d_model]."""
        self.keys: list[torch.Tensor] = []
        """Keys of each layer, normed and rotated [prompt, kv_head, position, d_head]; ``values`` are like it."""
        self.values: list[torch.Tensor] = []
        self._rules: list[AttentionRule] = []
        self._arguments: list[LayerArguments] = []
        self._forward = forward
        self._turn = turn
        self._norm = architecture.norm
        self._is_scaled = architecture.attention is None or architecture.attention.is_scaled
        self._sites = [sites_in_layer(architecture, cfg, layer) for layer in range(cfg.n_layers)]
        self._visible: list[torch.Tensor | None] = []
        """True where a position sees another in each layer [1, 1, position, source_position]; None if all see all."""
        self._sees_all: dict[tuple[int, int, int, int], bool] = {}
        self._groups: Sequence[Group] = ()
        self._edits: Mapping[str, Edit] = {}
        self._keys_seen: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.model_type = cfg.model_type
        """The family, for errors."""
        self.length = tokens.shape[1]
        self.logits = self._recorded(tokens)
        """Logits of the model [prompt, position, d_vocab]."""

    @property
    def is_causal(self) -> bool:
        """Whether no position sees a later one in any layer."""
        return self.length == 1 or all(
            visible is not None and not bool(visible.triu(1).any()) for visible in self._visible
        )

    def layer(
        self,
        layer: int,
        stream: "torch.Tensor",
        groups: Sequence[Group],
        edits: Mapping[str, Edit] | None = None,
    ) -> "torch.Tensor":
        """Run one layer over packed rows.

        Args:
            layer: its number.
            stream: residual stream into the layer [token, d_model], group after group.
            groups: the rows.
            edits: functions that edit values of hooks of the layer, by leaf.

        Returns:
            The residual stream out of the layer, of the same shape.
        """
        import torch

        positions = torch.cat(
            [
                torch.arange(group.start, group.stop, device=stream.device).repeat(group.n_rows)
                for group in groups
            ]
        )
        arguments = self._arguments[layer]
        args, kwargs = arguments.at(positions)
        self._groups, self._edits = groups, edits or {}
        try:
            with self._edited(layer):
                module = self._forward.layers[layer]
                if arguments.has_named_stream:
                    output = module(*args, hidden_states=stream[None], **kwargs)
                else:
                    output = module(stream[None], *args, **kwargs)
        finally:
            self._groups, self._edits = (), {}
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result[0]

    def layer_at_end(self, layer: int, stream: "torch.Tensor", groups: Sequence[Group]) -> "torch.Tensor":
        """Run one layer over packed rows, as `layer` does, for the last position of each row only [row, d_model].

        What other positions need beyond their keys and values is not computed.
        """
        import torch

        known: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._keys_seen = known
        try:
            with contextlib.suppress(Finished):
                self.layer(layer, stream, groups)
        finally:
            self._keys_seen = None
        ends = [
            Group(group.prompts, group.stop - 1, group.stop, True, its_keys)
            for group, its_keys in zip(groups, known, strict=True)
        ]
        streams = torch.split(stream, [group.n_tokens for group in groups])
        last = torch.cat(
            [
                part[group.n_positions - 1 :: group.n_positions]
                for part, group in zip(streams, groups, strict=True)
            ]
        )
        return self.layer(layer, last, ends)

    def head(self, stream: "torch.Tensor") -> "torch.Tensor":
        """Logits [row, d_vocab] of residual streams out of the last layer [row, d_model]."""
        return self._forward.head(stream, self._turn)

    def attend(self, layer: int, call: AttentionCall) -> Result:
        """Attention of packed rows: [1, head, token, d_head]."""
        import torch

        query, key, value = call.query, call.key, call.value
        for what, heads in (("attn.hook_rot_q", query), ("attn.hook_rot_k", key)):
            if what in self._edits:
                self._edits[what](heads[0].transpose(0, 1), 0, slice(None))
        n_heads, n_tokens = query.shape[1:3]
        out = torch.empty(1, n_tokens, n_heads, value.shape[-1], dtype=query.dtype, device=query.device)
        offset = 0
        for number, group in enumerate(self._groups):
            tokens = slice(offset, offset + group.n_tokens)
            offset += group.n_tokens
            queries, *computed = (_unpacked(packed[0, :, tokens], group) for packed in (query, key, value))
            own = group.known or (computed[0], computed[1])
            if self._keys_seen is None:
                mixed = out[0, tokens].view(group.n_rows, group.n_positions, n_heads, -1)
                self._attend_group(layer, queries, own, group, number, mixed.transpose(1, 2))
            else:
                self._keys_seen.append(own)
        if self._keys_seen is not None:
            raise Finished
        return out, None

    def _attend_group(
        self,
        layer: int,
        queries: "torch.Tensor",
        own: "tuple[torch.Tensor, torch.Tensor]",
        group: Group,
        number: int,
        out: "torch.Tensor",
    ) -> None:
        """Write the mix of values of each row into ``out`` [row, head, position, d_head], some rows at a time."""
        n_sources = group.stop if group.has_own_keys else self.length
        n_at_once = max(1, _SOURCES_AT_ONCE // n_sources)
        for first in range(0, group.n_rows, n_at_once):
            rows = slice(first, min(first + n_at_once, group.n_rows))
            keys = self._sources(self.keys[layer], own[0][rows], group, rows)
            values = self._sources(self.values[layer], own[1][rows], group, rows)
            out[rows] = self._mixed(layer, queries[rows], keys, values, group, number, rows)

    def _sources(
        self, recorded: "torch.Tensor", own: "torch.Tensor", group: Group, rows: slice
    ) -> "torch.Tensor":
        """Keys or values that rows attend to [row, kv_head, source_position, d_head]."""
        import torch

        prompts = group.prompts[rows]
        n_shared = recorded.shape[2] if not group.has_own_keys else group.stop - own.shape[2]
        shared = recorded[:, :, :n_shared]
        shared = shared.expand(len(prompts), -1, -1, -1) if len(shared) == 1 else shared[prompts]
        if not group.has_own_keys:
            return shared
        return own if n_shared == 0 else torch.cat([shared, own], dim=2)

    def _mixed(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        group: Group,
        number: int,
        rows: slice,
    ) -> "torch.Tensor":
        """The mix of values for each head [row, head, position, d_head]."""
        import torch

        rule = self._rules[layer]
        edits = [self._edits.get(leaf) for leaf in ("attn.hook_attn_scores", "attn.hook_pattern")]
        if not rule.is_plain or any(edits):
            scores = rule.scores(query, key, slice(None), group.start)
            if edits[0] is not None:
                edits[0](scores, number, rows)
            pattern = rule.pattern(scores).to(value.dtype)
            if edits[1] is not None:
                edits[1](pattern, number, rows)
            n_kv_heads = value.shape[1]
            shared = pattern.view(len(pattern), n_kv_heads, -1, pattern.shape[-1])
            return (shared @ value).view(*pattern.shape[:-1], -1)
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self._visible_to(layer, group, key),
            scale=rule.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _visible_to(self, layer: int, group: Group, key: "torch.Tensor") -> "torch.Tensor | None":
        """True where a position of a group sees another [1, 1, position, source_position]; None if it sees all."""
        visible = self._visible[layer]
        if visible is None:
            return None
        n_sources = key.shape[2]
        place = (layer, group.start, group.stop, n_sources)
        part = visible[..., group.start : group.stop, :n_sources]
        if place not in self._sees_all:
            self._sees_all[place] = bool(part.all())
        return None if self._sees_all[place] else part

    @contextlib.contextmanager
    def _edited(self, layer: int) -> Iterator[None]:
        """Taps for the edits at the modules of a layer; those inside of attention are made in `attend`."""
        leaves = self._edits.keys() - _IN_ATTENTION.keys()
        if not leaves:
            yield
            return
        module = self._forward.layers[layer]
        sites = {leaf: (module, site) for leaf, site in self._sites[layer].items() if leaf in leaves}
        if leaves - sites.keys():
            raise ModelError(f"layer {layer} has no {min(leaves - sites.keys())}")
        with tapped(sites, _Editing(self._edits), self._turn, batch=1, norm=self._norm, is_scaled=True):
            yield

    def _recorded(self, tokens: "torch.Tensor") -> "torch.Tensor":
        def before(_module: Any, args: Any, kwargs: Any) -> None:
            if not self._turn.is_passing():
                return
            is_named = not args
            self.streams.append(kwargs["hidden_states"] if is_named else args[0])
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self._arguments.append(LayerArguments(args[1:], rest, is_named, self.length))

        def after(_module: Any, _args: Any, output: Any) -> None:
            if not self._turn.is_passing():
                return
            self.streams.append(output[0] if isinstance(output, tuple) else output)

        def attended(call: AttentionCall) -> Result:
            rule = call.rule()
            if rule.mask is not None:
                rule.mask = rule.mask[:1]  # the same in every row, since nothing is padded
            self.keys.append(call.key)
            self.values.append(call.value)
            hidden = rule.hidden(slice(0, 1), self.length, self.length, call.key.device)
            self._rules.append(rule)
            visible = None if hidden is None else ~hidden
            if visible is not None:  # most layers see the same
                visible = next(
                    (seen for seen in self._visible if seen is not None and seen.equal(visible)), visible
                )
            self._visible.append(visible)
            return call.original(call.query, call.key, call.value)

        layers = self._forward.layers
        with contextlib.ExitStack() as stack:
            for module in layers:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layers[-1].register_forward_hook(after).remove)
            stack.enter_context(self.handling(lambda _layer, call: attended(call)))
            return self._forward.logits(tokens)

    def handling(
        self, handler: Callable[[int, AttentionCall], Result]
    ) -> contextlib.AbstractContextManager[None]:
        """A context in which a function is called in place of attention, with the number of the layer."""
        handlers: dict[nn.Module, Callable[[AttentionCall], Result]] = {}
        for layer, sites in enumerate(self._sites):
            for site in sites.values():
                if isinstance(site, AttentionSite):
                    module = self._forward.layers[layer].get_submodule(site.module)
                    handlers[module] = partial(handler, layer)
        return handled(handlers, self._turn, is_scaled=self._is_scaled)


def _unpacked(packed: "torch.Tensor", group: Group) -> "torch.Tensor":
    """Queries, keys or values of packed tokens [head, token, d_head] as [row, head, position, d_head]."""
    return packed.view(packed.shape[0], group.n_rows, group.n_positions, -1).transpose(0, 1)


class _Editing:
    """A visitor that calls the edits of packed values."""

    def __init__(self, edits: Mapping[str, Edit]) -> None:
        self._edits = edits

    def edits(self, name: str) -> bool:
        del name
        return True

    def visit(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        self._edits[name](value[0], 0, slice(None))
        return value


@contextlib.contextmanager
def packed_run(
    forward: Forward, base: "nn.Module", architecture: Architecture, cfg: HookedConfig, tokens: "torch.Tensor"
) -> Iterator[PackedRun]:
    """A context with a recorded run over prompts; no other forward of the model can run in it.

    Raises:
        ModelError: attention of the model cannot be handled, its mask is no tensor, or positions see later ones.
    """
    import torch

    with exclusive(base) as turn, torch.no_grad():
        run = PackedRun(forward, architecture, cfg, tokens, turn)
        if len(run.keys) != len(forward.layers):
            raise ModelError(
                f"{len(run.keys)} of the {len(forward.layers)} layers of this {cfg.model_type} model have attention "
                "that can be handled"
            )
        if not run.is_causal:
            raise ModelError(
                f"positions of this {cfg.model_type} model see later ones, and packed rows begin where they change"
            )
        if len({stream.device for stream in run.streams}) > 1:
            raise ModelError("the layers of this model lie on several devices, and packed rows need one")
        with run.handling(run.attend):
            yield run

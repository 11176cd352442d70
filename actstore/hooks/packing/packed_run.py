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
from actstore.hooks.families.architecture import Architecture
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.families.site import AttentionSite, sites_in_layer
from actstore.hooks.packing.layer_arguments import LayerArguments

if TYPE_CHECKING:
    import torch
    from torch import nn

Edit = Callable[["torch.Tensor", int], None]
"""Edits a value in place: ``edit(value, group)``.

The values of most hooks come once, [token, ...] over all groups, with group 0. Scores and patterns come group by group,
[row, head, position, source_position].
"""

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
    sources: "tuple[torch.Tensor, torch.Tensor] | None" = None
    """Keys and values of all positions up to ``stop`` [row, kv_head, source_position, d_head], if they are known."""

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
        self._visible: dict[tuple[int, int, int, bool], torch.Tensor | None] = {}
        self._groups: Sequence[Group] = ()
        self._edits: Mapping[str, Edit] = {}
        self._sources_seen: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.length = tokens.shape[1]
        self.logits = self._recorded(tokens)
        """Logits of the model [prompt, position, d_vocab]."""

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

        self._sources_seen = []
        with contextlib.suppress(Finished):
            self.layer(layer, stream, groups)
        sources, self._sources_seen = self._sources_seen, None
        ends = [
            Group(group.prompts, group.stop - 1, group.stop, True, its_sources)
            for group, its_sources in zip(groups, sources, strict=True)
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
        for what, rows in (("attn.hook_rot_q", query), ("attn.hook_rot_k", key)):
            if what in self._edits:
                self._edits[what](rows[0].transpose(0, 1), 0)
        n_heads, n_tokens = query.shape[1:3]
        out = torch.empty(1, n_tokens, n_heads, value.shape[-1], dtype=query.dtype, device=query.device)
        offset = 0
        for number, group in enumerate(self._groups):
            tokens = slice(offset, offset + group.n_tokens)
            offset += group.n_tokens

            def unpacked(packed: "torch.Tensor", group: Group = group, tokens: slice = tokens) -> Any:
                rows = packed[0, :, tokens]
                return rows.view(rows.shape[0], group.n_rows, group.n_positions, -1).transpose(0, 1)

            keys, values = group.sources or (
                self._sources(self.keys[layer], unpacked(key), group),
                self._sources(self.values[layer], unpacked(value), group),
            )
            if self._sources_seen is not None:
                self._sources_seen.append((keys, values))
                continue
            mixed = self._mixed(layer, unpacked(query), keys, values, group, number)
            out[0, tokens].view(group.n_rows, group.n_positions, n_heads, -1).copy_(mixed.transpose(1, 2))
        if self._sources_seen is not None:
            raise Finished
        return out, None

    def _sources(self, recorded: "torch.Tensor", own: "torch.Tensor", group: Group) -> "torch.Tensor":
        """Keys or values that rows attend to [row, kv_head, source_position, d_head]."""
        import torch

        shared = recorded if not group.has_own_keys else recorded[:, :, : group.start]
        is_one = len(shared) == 1
        shared = shared.expand(group.n_rows, -1, -1, -1) if is_one else shared[group.prompts]
        if not group.has_own_keys:
            return shared
        return own if group.start == 0 else torch.cat([shared, own], dim=2)

    def _mixed(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        group: Group,
        number: int,
    ) -> "torch.Tensor":
        """The mix of values for each head [row, head, position, d_head]."""
        import torch

        rule = self._rules[layer]
        edits = [self._edits.get(leaf) for leaf in ("attn.hook_attn_scores", "attn.hook_pattern")]
        if not rule.is_plain or any(edits):
            scores = rule.scores(query, key, slice(None), group.start)
            if edits[0] is not None:
                edits[0](scores, number)
            pattern = rule.pattern(scores).to(value.dtype)
            if edits[1] is not None:
                edits[1](pattern, number)
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
        place = (layer, group.start, group.stop, group.has_own_keys)
        if place not in self._visible:
            hidden = self._rules[layer].hidden(
                slice(0, 1), group.n_positions, key.shape[2], key.device, group.start
            )
            self._visible[place] = None if hidden is None or not hidden.any() else ~hidden
        return self._visible[place]

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
            is_named = not args
            self.streams.append(kwargs["hidden_states"] if is_named else args[0])
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self._arguments.append(LayerArguments(args[1:], rest, is_named, self.length))

        def after(_module: Any, _args: Any, output: Any) -> None:
            self.streams.append(output[0] if isinstance(output, tuple) else output)

        def attended(call: AttentionCall) -> Result:
            rule = call.rule()
            if rule.mask is not None:
                rule.mask = rule.mask[:1]  # the same in every row, since nothing is padded
            self.keys.append(call.key)
            self.values.append(call.value)
            self._rules.append(rule)
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


class _Editing:
    """A visitor that calls the edits of packed values."""

    def __init__(self, edits: Mapping[str, Edit]) -> None:
        self._edits = edits

    def edits(self, name: str) -> bool:
        del name
        return True

    def visit(self, name: str, value: "torch.Tensor") -> "torch.Tensor":
        self._edits[name](value[0], 0)
        return value


@contextlib.contextmanager
def packed_run(
    forward: Forward, base: "nn.Module", architecture: Architecture, cfg: HookedConfig, tokens: "torch.Tensor"
) -> Iterator[PackedRun]:
    """A context with a recorded run over prompts; no other forward of the model can run in it.

    Raises:
        ModelError: attention of the model cannot be handled, or its mask is no tensor.
    """
    import torch

    with exclusive(base) as turn, torch.no_grad():
        run = PackedRun(forward, architecture, cfg, tokens, turn)
        if len(run.keys) != len(forward.layers):
            raise ModelError(
                f"{len(run.keys)} of the {len(forward.layers)} layers of this {cfg.model_type} model have attention "
                "that can be handled"
            )
        if len({stream.device for stream in run.streams}) > 1:
            raise ModelError("the layers of this model lie on several devices, and packed rows need one")
        with run.handling(run.attend):
            yield run

"""One forward of a Hugging Face model past its hooks, without KV cache and without parts that are not needed."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from actstore.hooks.capture.exclusive import Turn, exclusive
from actstore.hooks.capture.taps import tapped
from actstore.hooks.capture.visitor import Finished, Visitor
from actstore.hooks.families.architectures import Architecture
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.families.site import AnySite, sites_in_layer, sites_outside
from actstore.hooks.naming.hook_points import POINTS
from actstore.hooks.naming.names import join, layer_of

if TYPE_CHECKING:
    import torch
    from torch import nn


class Forward:
    """Runs the unmodified modules of a model."""

    def __init__(self, model: Any, base: "nn.Module", architecture: Architecture, cfg: HookedConfig) -> None:
        """
        Args:
            model: the model with its head, if it has one.
            base: the model without its head.
            architecture: the paths of its parts.
            cfg: its sizes.
        """
        self._model = model
        self.base = base
        self._architecture = architecture
        layers: Any = base.get_submodule(architecture.layers)
        self.layers = layers
        paths = (architecture.embed, architecture.pos_embed)
        self._is_tuple: bool | None = None
        self._embeddings = [base.get_submodule(path) for path in paths if path is not None]
        self._sites: dict[str, tuple[nn.Module, AnySite]] = {
            leaf: (base, site) for leaf, site in sites_outside(architecture).items()
        }
        order = {point.leaf: index for index, point in enumerate(POINTS)}
        for index in range(len(self.layers)):
            sites = sites_in_layer(architecture, cfg, index)
            for leaf in sorted(sites, key=order.__getitem__):
                self._sites[join(index, leaf)] = (self.layers[index], sites[leaf])

    def run(
        self,
        tokens: "torch.Tensor",
        visitor: Visitor,
        names: Iterable[str],
        *,
        mask: "torch.Tensor | None" = None,
        start_at_layer: int = 0,
        residual: "torch.Tensor | None" = None,
        stop_at_layer: int | None = None,
        past: Any = None,
        has_logits: bool = True,
        has_graph: bool = False,
    ) -> "torch.Tensor | None":
        """Run a forward over token ids [batch, position].

        Args:
            tokens: ids; positions attend to all earlier positions of their row.
            visitor: sees the values of the hooks; it may raise `Finished`.
            names: canonical names of the hooks to visit.
            mask: [batch, position], 0 where a row is padded; positions are counted without padding then.
            start_at_layer: the layer to start at; the number of layers runs the final norm and the head alone.
            residual: the stream into that layer [batch, position, d_model], if it is not computed from the tokens.
            stop_at_layer: end before this layer.
            past: a cache of keys and values of the positions before, which grows by these; ``mask`` covers both.
            has_logits: run the head.
            has_graph: record a graph for gradients, with the embeddings or the given stream at its root.

        Returns:
            Logits [batch, position, d_vocab]; or the residual stream into ``stop_at_layer``; or None.
        """
        given = self._given(tokens, mask, past)
        start = None if residual is None else start_at_layer
        import torch

        grad_mode = torch.enable_grad() if has_graph else torch.no_grad()
        with (
            grad_mode,
            self.watched(visitor, names, batch=tokens.shape[0], start_at_layer=start) as turn,
            contextlib.ExitStack() as stack,
        ):
            if has_graph:
                for embedding in self._embeddings:
                    # Before the taps, which see the root.
                    root = embedding.register_forward_hook(_root(turn), prepend=True)
                    stack.callback(root.remove)
            if residual is not None:
                if has_graph and not residual.requires_grad:
                    residual = residual.detach().requires_grad_()
                stack.enter_context(self._started_at(start_at_layer, residual, turn))
            if stop_at_layer is not None:
                return self._until(stop_at_layer, given, turn)
            with contextlib.suppress(Finished):
                if has_logits:
                    logits: torch.Tensor = self._model(**given).logits
                    return logits
                self.base(**given)
            return None

    @contextlib.contextmanager
    def watched(
        self, visitor: Visitor, names: Iterable[str], *, batch: int, start_at_layer: int | None = None
    ) -> Iterator[Turn]:
        """Show the visitor what the calls of the model in this context compute. Other threads wait until it ends.

        Args:
            visitor: sees the values of the hooks.
            names: canonical names of the hooks to visit.
            batch: rows of each call.
            start_at_layer: the layer before which hooks are not visited; None for none.
        """
        reached = self.reached(names, start_at_layer)
        sites = {name: site for name, site in self._sites.items() if name in reached}
        attention = self._architecture.attention
        with (
            exclusive(self.base) as turn,
            tapped(
                sites,
                visitor,
                turn,
                batch=batch,
                norm=self._architecture.norm,
                is_scaled=attention is None or attention.is_scaled,
            ),
        ):
            yield turn

    def logits(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """Logits of token ids [batch, position]; call it while holding a turn."""
        result: torch.Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return result

    def head(self, stream: "torch.Tensor", turn: Turn) -> "torch.Tensor":
        """Logits [row, d_vocab] of streams out of the last layer [row, d_model]; call it while holding a turn."""
        import torch

        # Rows of one position, since a learned embedding may have fewer positions than there are rows.
        tokens = torch.zeros(
            len(stream), 1, dtype=torch.long, device=next(self._embeddings[0].parameters()).device
        )
        with self._started_at(len(self.layers), stream[:, None], turn):
            return self.logits(tokens)[:, 0]

    def reached(self, names: Iterable[str], start_at_layer: int | None = None) -> frozenset[str]:
        """Those of these hooks that a forward comes to. Those inside of what is inserted at a hook come with it.

        Args:
            names: canonical names.
            start_at_layer: the layer before which hooks are not visited; None for none.
        """
        return frozenset(
            name
            for name in names
            if name in self._sites and (start_at_layer is None or not self._is_before(start_at_layer, name))
        )

    def call(self, tokens: "torch.Tensor", mask: "torch.Tensor | None", past: Any) -> None:
        """Call the model without its head, in a context of `watched`; arguments are those of `run`."""
        self.base(**self._given(tokens, mask, past))

    @staticmethod
    def _given(tokens: "torch.Tensor", mask: "torch.Tensor | None", past: Any) -> dict[str, Any]:
        """The arguments of the model."""
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": past is not None}
        if past is not None:
            given["past_key_values"] = past
        if mask is not None and not bool(mask.all()):
            given["attention_mask"] = mask
            given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return given

    @staticmethod
    def _is_before(layer: int, name: str) -> bool:
        number = layer_of(name)
        return name in ("hook_embed", "hook_pos_embed") if number is None else number < layer

    @contextlib.contextmanager
    def _started_at(self, layer: int, residual: "torch.Tensor", turn: Turn) -> Iterator[None]:
        """Put a residual stream in front of a layer, and let the layers before it do nothing."""
        # The base model makes masks and positions as always, so it runs whole, over layers that give what they take.
        is_tuple = layer > 0 and self._gives_tuple(turn)

        def into(_module: Any, args: Any, kwargs: Any) -> Any:
            if not turn.is_passing():
                return None
            return ((residual, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": residual})

        first = self.layers[min(layer, len(self.layers) - 1)]
        handle = first.register_forward_pre_hook(into, prepend=True, with_kwargs=True)
        with contextlib.ExitStack() as stack:
            stack.callback(handle.remove)
            for module in self.layers[:layer]:
                own = vars(module).get("forward")  # accelerate puts one there
                module.forward = _passing(module.forward, turn, is_tuple=is_tuple)
                stack.callback(_give_back, module, own)
            yield

    def _gives_tuple(self, turn: Turn) -> bool:
        """Whether layers return tuples, as those of older families do; tried out once, while holding a turn."""
        import torch

        if self._is_tuple is not None:
            return self._is_tuple
        outputs: list[Any] = []

        def after(_module: Any, _args: Any, output: Any) -> None:
            if not turn.is_passing():
                return
            outputs.append(output)
            raise Finished

        device = next(self._embeddings[0].parameters()).device
        handle = self.layers[0].register_forward_hook(after)
        try:
            with contextlib.suppress(Finished), torch.no_grad():
                self.base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        finally:
            handle.remove()
        self._is_tuple = isinstance(outputs[0], tuple)
        return self._is_tuple

    def _until(self, layer: int, given: dict[str, Any], turn: Turn) -> "torch.Tensor":
        """Run a forward up to a layer, and return the residual stream into it, or out of the last layer."""
        reached: list[torch.Tensor] = []

        def before(_module: Any, args: Any, kwargs: Any) -> None:
            if not turn.is_passing():
                return
            reached.append(args[0] if args else kwargs["hidden_states"])
            raise Finished

        def after(_module: Any, _args: Any, output: Any) -> None:
            if not turn.is_passing():
                return
            reached.append(output[0] if isinstance(output, tuple) else output)
            raise Finished

        if layer < len(self.layers):
            handle = self.layers[layer].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.layers[-1].register_forward_hook(after)
        try:
            with contextlib.suppress(Finished):
                self.base(**given)
        finally:
            handle.remove()
        return reached[0]


def _passing(forward: Callable[..., Any], turn: Turn, *, is_tuple: bool) -> Callable[..., Any]:
    """A forward of a layer that gives the stream as it takes it; calls of other threads go to the layer's own."""

    def passing(hidden_states: "torch.Tensor", *args: Any, **kwargs: Any) -> Any:
        if not turn.is_passing():
            return forward(hidden_states, *args, **kwargs)
        return (hidden_states,) if is_tuple else hidden_states

    return passing


def _give_back(module: Any, forward: Any) -> None:
    """Undo the replacement of a module's forward."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _root(turn: Turn) -> "Callable[[Any, Any, torch.Tensor], torch.Tensor]":
    """A PyTorch hook for embeddings that makes their output the root of a graph: parameters require no gradients."""

    def root(_module: Any, _args: Any, output: "torch.Tensor") -> "torch.Tensor":
        is_leaf = output.requires_grad or not turn.is_passing()
        return output if is_leaf else output.detach().requires_grad_()

    return root

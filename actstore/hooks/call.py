"""One forward as a user asks for it: which part of the model is run on what, and what is given back."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError, ModelError, TokensError
from actstore.hooks.capture.forward import Forward
from actstore.hooks.capture.functions import NameFilter
from actstore.hooks.capture.keeping import Keeping
from actstore.hooks.capture.visitor import Ending
from actstore.hooks.loss import ReturnType, check_has_loss, output
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.naming.names import HookNames
from actstore.hooks.text.past import filled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Call:
    """A forward over token ids, or over a residual stream."""

    ids: "torch.Tensor"
    """Token ids [batch, position]; without meaning, except for the loss, if there is a residual stream."""
    mask: "torch.Tensor | None"
    """[batch, position], 0 at padding; with ``past``, over the positions there, too."""
    residual: "torch.Tensor | None"
    """The stream into the layer ``start`` [batch, position, d_model]."""
    start: int
    stop: int | None
    """The layer before which the forward ends."""
    past: Any
    """A cache of Hugging Face with keys and values of earlier positions."""
    return_type: ReturnType
    loss_per_token: bool
    has_graph: bool

    @property
    def has_logits(self) -> bool:
        return self.return_type is not None and self.stop is None

    def check(self, *, has_head: bool, has_tokens: bool) -> None:
        """Refuse what does not go together.

        Args:
            has_head: whether the model has its head.
            has_tokens: whether the ids have a meaning.

        Raises:
            HookError: the forward ends before it starts; or its cache would be left in pieces, or have no gradients.
            ModelError: the model has no head, or the kind of output is not known.
            TokensError: there is no loss.
        """
        if self.return_type not in ("logits", "loss", "both", None):
            raise ModelError(
                f"return_type is {quoted(self.return_type)}; choose 'logits', 'loss', 'both' or None"
            )
        if self.stop is not None and self.stop < self.start:
            raise HookError(f"the forward would start at layer {self.start} and end before layer {self.stop}")
        if self.has_logits and not has_head:
            raise ModelError("this model was loaded without its head; choose return_type=None")
        if self.past is not None and (self.residual is not None or self.stop is not None):
            raise HookError(
                "a forward over some of the layers would leave past_kv_cache without the keys of the others; leave out "
                "one of the two"
            )
        if self.past is not None and self.has_graph:
            raise HookError("gradients do not reach the keys in past_kv_cache; give all tokens in one call")
        if self.has_logits and self.return_type != "logits":
            if not has_tokens:
                raise TokensError(
                    "the loss of a forward that starts at a layer needs its token ids; give tokens"
                )
            check_has_loss(self.ids, self._new_mask)

    def run(self, forward: Forward, visitor: Keeping) -> Any:
        """The logits, the loss, both, or the stream into the layer where the forward ends; or None."""
        # A forward that fills a cache goes through all layers.
        is_whole = self.has_logits or self.stop is not None or self.past is not None
        start = None if self.residual is None else self.start
        with contextlib.nullcontext() if self.past is None else filled(self.past, self.mask):
            result = forward.run(
                self.ids,
                visitor if is_whole else Ending(visitor, forward.reached(visitor.names, start)),
                visitor.names,
                mask=self.mask,
                start_at_layer=self.start,
                residual=self.residual,
                stop_at_layer=self.stop,
                past=self.past,
                has_logits=self.has_logits,
                has_graph=self.has_graph,
            )
        if not self.has_logits or result is None:
            return result
        return output(result, self.ids, self._new_mask, self.return_type, per_token=self.loss_per_token)

    def reached(
        self, names: HookNames, wanted: Sequence[str], names_filter: NameFilter | None
    ) -> tuple[str, ...]:
        """The hooks among those that a filter selects that this forward reaches.

        Raises:
            HookError: one of the others was named.
        """
        if self.stop is None and self.residual is None:
            return tuple(wanted)
        reached = frozenset(names.all) if self.stop is None else names.before(self.stop)
        if self.residual is not None:
            reached -= names.before(self.start)
        missed = [name for name in wanted if name not in reached]
        if missed and not _is_open(names_filter):
            if self.stop is not None and missed[-1] not in names.before(self.stop):
                raise HookError(
                    f"{missed[-1]} comes after stop_at_layer={self.stop}; stop later, or leave it out"
                )
            raise HookError(
                f"{missed[0]} comes before start_at_layer={self.start}; start earlier, or leave it out"
            )
        return tuple(name for name in wanted if name in reached)

    @property
    def _new_mask(self) -> "torch.Tensor | None":
        return None if self.mask is None else self.mask[:, -self.ids.shape[1] :]


def layer_number(layer: int, n_layers: int, argument: str) -> int:
    """A layer counted from the beginning; the number of layers is the place behind the last.

    Raises:
        HookError: there is no such layer. The message has the name of the argument.
    """
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise HookError(f"{argument} is {layer!r}; give the number of a layer")
    number = layer + n_layers if layer < 0 else layer
    if not 0 <= number <= n_layers:
        raise HookError(f"{argument} is {layer}; this model has layers 0 to {n_layers - 1}")
    return number


def _is_open(names_filter: NameFilter | None) -> bool:
    """Whether the filter names no hook in particular, so that hooks that are not reached may be left out."""
    names = [names_filter] if isinstance(names_filter, str) else names_filter
    return names is None or callable(names) or any(isinstance(name, str) and "*" in name for name in names)

"""The ends of paths: which parts of a model send, and which receive."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from actstore.errors import PatchError
from actstore.hooks.model import HookedModel
from actstore.patching.results.panels import Axis

Component = Literal["q", "k", "v"]
"""What a head reads the stream for: its queries, keys or values."""

_COMPONENTS: Final = ("q", "k", "v")


@dataclass(frozen=True)
class Sender:
    """A head, or the MLP of a layer, whose output takes its clean value."""

    layer: int
    head: int | None
    """None for the MLP."""

    def __str__(self) -> str:
        return f"mlp {self.layer}" if self.head is None else f"{self.layer}.{self.head}"


@dataclass(frozen=True)
class Receiver:
    """What reads the stream: queries, keys or values of a head, the MLP of a layer, or the logits."""

    layer: int
    """The number of layers for the logits."""
    head: int | None
    """The head; for keys and values, the one that a group of queries shares."""
    what: Literal["q", "k", "v", "mlp", "logits"]

    @property
    def leaf(self) -> str:
        """The hook whose value is replaced; empty for the logits."""
        if self.what == "logits":
            return ""
        return "hook_mlp_out" if self.what == "mlp" else f"attn.hook_{self.what}"

    def is_reached_by(self, sender: Sender, is_parallel: bool) -> bool:
        """Whether the sender writes to the stream that the receiver reads.

        Args:
            sender: a sender.
            is_parallel: whether attention and MLP of a layer both read the stream into the layer.
        """
        if sender.layer == self.layer:
            return self.what == "mlp" and sender.head is not None and not is_parallel
        return sender.layer < self.layer

    def label(self, is_grouped: bool) -> str:
        """What it is called: ``5.3.q``, ``5.kv1.k``, ``mlp 4`` or ``logits``.

        Args:
            is_grouped: whether several heads of queries share keys and values.
        """
        if self.what == "logits":
            return "logits"
        if self.what == "mlp":
            return f"mlp {self.layer}"
        is_shared = is_grouped and self.what != "q"
        return f"{self.layer}.{'kv' if is_shared else ''}{self.head}.{self.what}"


SenderGroups = list[list[Sender]]
ReceiverGroups = list[list[Receiver]]


def sender_groups(model: HookedModel, senders: Any) -> tuple[SenderGroups, tuple[Axis, ...]]:
    """The groups of senders that a caller names, and the axes that they fill.

    Args:
        model: the model.
        senders: ``heads`` or ``mlps`` for all of them; or a list of ``(layer, head)`` and ``(layer, "mlp")``, and of
            lists of these, which send together.

    Raises:
        PatchError: it is something else, or not in the model.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if senders == "heads":
        every = [[Sender(layer, head)] for layer in range(n_layers) for head in range(n_heads)]
        return every, (_numbered("layer", n_layers), _numbered("head", n_heads))
    if senders == "mlps":
        return [[Sender(layer, None)] for layer in range(n_layers)], (_numbered("layer", n_layers),)
    if isinstance(senders, tuple) and senders and not isinstance(senders[0], tuple | list):
        senders = [senders]
    groups = _groups(senders, "senders", lambda item: _sender(model, item))
    labels = tuple(" and ".join(map(str, group)) for group in groups)
    return groups, (Axis("sender", labels),)


def receiver_groups(model: HookedModel, receivers: Any) -> tuple[ReceiverGroups, tuple[Axis, ...]]:
    """The groups of receivers that a caller names, and the axes that they fill.

    Args:
        model: the model.
        receivers: ``q``, ``k``, ``v`` or ``mlps`` for all of them; ``logits``; or a list of ``(layer, head, "q")``,
            ``(layer, "mlp")`` and ``logits``, and of lists of these, which receive together.

    Raises:
        PatchError: it is something else, or not in the model.
    """
    n_layers = model.cfg.n_layers
    if receivers in _COMPONENTS:
        n_heads = _n_heads(model, receivers)
        every = [[Receiver(layer, head, receivers)] for layer in range(n_layers) for head in range(n_heads)]
        name = "to_head" if n_heads == model.cfg.n_heads else "to_kv_head"
        return every, (_numbered("to_layer", n_layers), _numbered(name, n_heads))
    if receivers == "mlps":
        return [[Receiver(layer, None, "mlp")] for layer in range(n_layers)], (
            _numbered("to_layer", n_layers),
        )
    if receivers == "logits":
        receivers = ["logits"]
    if isinstance(receivers, tuple) and receivers and not isinstance(receivers[0], tuple | list | str):
        receivers = [receivers]
    groups = _groups(receivers, "receivers", lambda item: _receiver(model, item))
    for group in groups:
        if len(group) > 1 and any(receiver.what == "logits" for receiver in group):
            raise PatchError(
                "logits receive together with another receiver; they leave nothing for it to change, so give them "
                "a cell of their own"
            )
    is_grouped = model.cfg.n_key_value_heads != model.cfg.n_heads
    labels = tuple(" and ".join(receiver.label(is_grouped) for receiver in group) for group in groups)
    return groups, (Axis("receiver", labels),)


def _groups(given: Any, what: str, one: Callable[[Any], Any]) -> list[list[Any]]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise PatchError(f"{what} is {given!r}; give a list of them, or the name of all of one kind")
    groups = []
    for item in given:
        group = item if isinstance(item, list) else [item]
        if not group:
            raise PatchError(f"{what} holds an empty list")
        groups.append([one(member) for member in group])
    return groups


def _sender(model: HookedModel, given: Any) -> Sender:
    layer, *rest = _parts(given, 2, "a sender", '(layer, head) or (layer, "mlp")')
    number = _number(layer, model.cfg.n_layers, "layer", given)
    if rest[0] == "mlp":
        return Sender(number, None)
    return Sender(number, _number(rest[0], model.cfg.n_heads, "head", given))


def _receiver(model: HookedModel, given: Any) -> Receiver:
    n_layers = model.cfg.n_layers
    if given == "logits":
        return Receiver(n_layers, None, "logits")
    expected = '(layer, head, "q"), with "k" or "v" in place of "q", (layer, "mlp") or "logits"'
    n_parts = 2 if isinstance(given, tuple) and given[-1:] == ("mlp",) else 3
    layer, *rest = _parts(given, n_parts, "a receiver", expected)
    number = _number(layer, n_layers, "layer", given)
    if n_parts == 2:
        return Receiver(number, None, "mlp")
    head, component = rest
    if component not in _COMPONENTS:
        raise PatchError(f"a receiver is {given!r}; give {expected}")
    n_heads = _n_heads(model, component)
    if n_heads < model.cfg.n_heads and isinstance(head, int) and n_heads <= head < model.cfg.n_heads:
        raise PatchError(
            f"{given!r} is not in this model, which has heads 0 to {n_heads - 1} of keys and values; number {head} of "
            f"the queries reads number {head * n_heads // model.cfg.n_heads}"
        )
    return Receiver(number, _number(head, n_heads, "head", given), component)


def _parts(given: Any, n_parts: int, what: str, expected: str) -> tuple[Any, ...]:
    if not isinstance(given, tuple) or len(given) != n_parts:
        raise PatchError(f"{what} is {given!r}; give {expected}")
    return given


def _number(given: Any, size: int, what: str, node: Any) -> int:
    try:
        number = operator.index(given)
    except TypeError:
        raise PatchError(f"{node!r} has {given!r} for a {what}; give its number") from None
    if not 0 <= number < size:
        raise PatchError(f"{node!r} is not in this model, which has {what}s 0 to {size - 1} there")
    return number


def _n_heads(model: HookedModel, component: str) -> int:
    return model.cfg.n_heads if component == "q" else model.cfg.n_key_value_heads


def _numbered(name: str, size: int) -> Axis:
    return Axis(name, tuple(map(str, range(size))))

"""Handlers of attention: functions that are called in place of the attention function of chosen modules.

transformers looks up the attention function of a model by name in a table. While handlers are there, the entry of the
implementation in use is a function that calls the handler of the module, or the original where it has none. The name
stays the same, so that masks are made, and kernels chosen, exactly as without a handler. Modules of GPT-Neo and GPT-J
have a method ``_attn`` instead.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import ModelError
from actstore.hooks.capture.attention_rule import AttentionRule
from actstore.hooks.capture.exclusive import Turn

if TYPE_CHECKING:
    import torch
    from torch import nn

Result = tuple["torch.Tensor", "torch.Tensor | None"]
"""What attention gives: (output [batch, position, head, d_head], pattern or None)."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function."""

    query: "torch.Tensor"
    """Queries, normed and rotated [batch, head, position, d_head]; keys and values have ``kv_head`` in place.

    Where there is a cache, keys and values are those of all positions so far, and the memory is that of the cache.
    """
    key: "torch.Tensor"
    value: "torch.Tensor"
    original: Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], Result]
    """The function of the model; it takes queries, keys and values in these shapes."""
    rule: Callable[[], AttentionRule]
    """Gives the rule that the original follows.

    It raises ModelError if the implementation takes a mask that is not a tensor.
    """


Handler = Callable[[AttentionCall], Result]

_lock: Final = threading.Lock()
_handlers: Final[dict[int, tuple[Handler, Turn]]] = {}
"""Handlers by the id of their attention module. Modules of other models, in any thread, are not touched."""


@contextlib.contextmanager
def handled(handlers: Mapping["nn.Module", Handler], turn: Turn, *, is_scaled: bool = True) -> Iterator[None]:
    """Call handlers in place of the attention of modules, until the context ends.

    Args:
        handlers: the handler of each attention module.
        turn: the forward that the modules belong to; other calls of them go to the original.
        is_scaled: whether modules with a method ``_attn`` divide scores by the root of d_head.

    Raises:
        ModelError: a module has neither a table of attention functions nor a method ``_attn``.
    """
    with contextlib.ExitStack() as stack:
        for module, handler in handlers.items():
            if hasattr(module, "_attn"):
                stack.enter_context(_wrapped_method(module, handler, turn, is_scaled=is_scaled))
            else:
                stack.enter_context(_in_table(module))
                _handlers[id(module)] = (handler, turn)
                stack.callback(_handlers.pop, id(module))
        yield


@contextlib.contextmanager
def _in_table(module: Any) -> Iterator[None]:
    """Put the function that asks for handlers into the table that this module reads."""
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
        if isinstance(entry, _Asking):
            entry.users += 1
        else:
            # The eager function is no entry of the table but belongs to the file of the model.
            original = None if kind == "eager" else table[kind]
            table[kind] = entry = _Asking(original, replaced=entry)
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


class _Asking:
    """The entry in the table while there are handlers."""

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
        function = self.original or sys.modules[type(module).__module__].eager_attention_forward
        entry = _handlers.get(id(module))
        if entry is None or not entry[1].is_passing():
            return function(module, query, key, value, attention_mask, **kwargs)

        def original(query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor") -> Any:
            return function(module, query, key, value, attention_mask, **kwargs)

        def rule() -> AttentionRule:
            import torch

            if not isinstance(attention_mask, torch.Tensor | None):
                implementation = getattr(module.config, "_attn_implementation", None)
                raise ModelError(
                    f"scores and patterns cannot be had from {implementation}, whose mask is a "
                    f"{type(attention_mask).__name__}; load the model with attention='sdpa' or 'eager'"
                )
            scaling = kwargs.get("scaling")
            return AttentionRule(
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                softcap=kwargs.get("softcap"),
                window=kwargs.get("sliding_window"),
                sinks=kwargs.get("s_aux"),
                is_causal=kwargs.get("is_causal", getattr(module, "is_causal", True)),
                mask=attention_mask,
                offset=key.shape[-2] - query.shape[-2],
            )

        return entry[0](AttentionCall(query, key, value, original, rule))


@contextlib.contextmanager
def _wrapped_method(module: Any, handler: Handler, turn: Turn, *, is_scaled: bool) -> Iterator[None]:
    """Wrap the method ``_attn`` of a module, which has heads before positions in its output."""
    method = module._attn

    def wrapped(query: Any, key: Any, value: Any, attention_mask: Any = None) -> Any:
        if not turn.is_passing():
            return method(query, key, value, attention_mask)

        def original(query: Any, key: Any, value: Any) -> Result:
            out, pattern = method(query, key, value, attention_mask)
            return out.transpose(1, 2), pattern

        def rule() -> AttentionRule:
            local = getattr(module, "bias", None)  # GPT-Neo: which positions a local layer sees
            n_sources = key.shape[-2]
            offset = n_sources - query.shape[-2]
            return AttentionRule(
                scaling=query.shape[-1] ** -0.5 if is_scaled else 1.0,
                is_causal=True,
                mask=attention_mask,
                local=None if local is None else local[:, :, offset:n_sources, :n_sources],
                offset=offset,
            )

        out, pattern = handler(AttentionCall(query, key, value, original, rule))
        return out.transpose(1, 2), pattern

    module._attn = wrapped
    try:
        yield
    finally:
        del module._attn

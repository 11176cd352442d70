"""PyTorch hooks that others have put on a model, which packed rows would call with rows that are not theirs."""

from itertools import chain
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

_HARMLESS: Final = ("actstore.", "transformers.")
"""Packages whose hooks know how rows are packed, or only look."""


def hooked_by_others(model: "nn.Module") -> str | None:
    """The path of the first module of a model that has a PyTorch hook of others; None if there is none.

    What such a hook does may depend on the position, and its positions are those of a forward over whole prompts.
    """
    for path, module in model.named_modules():
        hooks = list(chain(module._forward_pre_hooks.values(), module._forward_hooks.values()))
        if any(not str(getattr(hook, "__module__", "")).startswith(_HARMLESS) for hook in hooks):
            return path or type(module).__name__
    return None

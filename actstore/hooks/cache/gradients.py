"""Gradients of a number with respect to the values of a run."""

from typing import TYPE_CHECKING

from actstore.errors import HookError
from actstore.hooks.cache.cached_values import CachedValues, why_not_computed
from actstore.hooks.capture.functions import NameFilter, selected
from actstore.hooks.messages.quoted import quoted
from actstore.reason import reason

if TYPE_CHECKING:
    import torch


def gradients_by_hook(
    cache: CachedValues, of: "torch.Tensor", names_filter: NameFilter | None
) -> "dict[str, torch.Tensor]":
    """The gradients of a number with respect to the values of a cache, by hook: ``ActivationCache.gradients``."""
    import torch

    if cache.kind != "activations":
        raise HookError(f"gradients are those of activations, and {why_not_computed(cache)}")
    names = set(cache.cache_dict if names_filter is None else selected(cache.names, names_filter))
    lacking = names - cache.cache_dict.keys()
    if lacking:
        raise HookError(f"this cache does not hold {min(lacking)}, so it has no gradient; add it to the run")
    values = {
        name: value for name, value in cache.cache_dict.items() if name in names and value.requires_grad
    }
    if not isinstance(of, torch.Tensor) or of.numel() != 1 or not of.requires_grad or not values:
        raise HookError(
            f"expected a tensor of one number, computed from a run with grad=True, found {quoted(of)}; run with "
            "grad=True, and take a mean or a sum of what came out"
        )
    try:
        gradients = torch.autograd.grad(of.sum(), list(values.values()), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise HookError(f"the gradients cannot be computed: {reason(error)}") from error
        raise HookError(
            "the graph of this run has been freed, as backward() and torch.autograd.grad do unless told "
            "retain_graph=True; run again with grad=True"
        ) from error
    for name, gradient in zip(values, gradients, strict=True):
        if gradient is None:
            raise HookError(
                f"the number was not computed from {name} as this cache holds it, so it has no gradient; leave it "
                "out of names_filter, and choose rows or positions after"
            )
    return dict(zip(values, gradients, strict=True))

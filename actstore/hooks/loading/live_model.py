"""Checking the state of a model that a user gives, and finding the device that takes its token ids."""

from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.loading.adapters import inside

if TYPE_CHECKING:
    import torch
    from torch import nn


def checked(model: Any) -> tuple[Any, Any]:
    """Check a model that a user gives.

    Returns:
        (the model of transformers that runs, its configuration)

    Raises:
        ModelError: it is no model, it is in training mode, its weights are not there, or its adapter cannot be hooked.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"expected a model of transformers, found {model!r}; names and folders are for HookedModel.from_pretrained"
        )
    if model.training:
        raise ModelError(
            "the model is in training mode, where dropout makes its values random; call model.eval()"
        )
    # add_adapter leaves what it adds in training mode.
    training = next((path for path, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ModelError(
            f"the module {training} is in training mode, where dropout makes values random; call model.eval()"
        )
    _check_has_weights(model)
    return inside(model), config


def device_of(embedding: "nn.Module", base: "nn.Module") -> "torch.device":
    """The device that token ids must be on: the base model's, or the one accelerate runs the embedding on."""
    import torch

    hook = getattr(embedding, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    return next(base.parameters()).device


def _check_has_weights(model: Any) -> None:
    is_lacking = any(parameter.is_meta for parameter in model.parameters())
    if is_lacking and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModelError(
            "weights of the model are on the device meta, so they have no values; load them with from_pretrained"
        )

"""The residual stream of families that have no entry in the table of architectures."""

from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.families.architectures import ARCHITECTURES, Architecture
from actstore.hooks.messages.load_errors import explaining

if TYPE_CHECKING:
    from torch import nn


def generic_architecture(config: Any) -> Architecture:
    """Find the layers and the embedding of a model whose family is not in the table.

    This looks at the modules of a model without weights. Loading checks that the streams are what they seem to be.

    Raises:
        ModelError: there is not exactly one list of layers, or the model is no language model.
    """
    from torch import device, nn
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    n_layers = getattr(config, "num_hidden_layers", None)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        raise cannot_hook(kind, "it is not a causal language model that transformers knows by itself")
    if n_layers is None or getattr(config, "hidden_size", None) is None:
        raise cannot_hook(kind, "its configuration has no num_hidden_layers or hidden_size")
    with explaining(config.name_or_path or kind), device("meta"):
        base = AutoModel.from_config(config)
    lists = [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        names = " and ".join(outer) or "none"
        raise cannot_hook(kind, f"one list of {n_layers} layers was expected in it, found {names}")
    return Architecture(
        prefix=base.base_model_prefix,
        layers=outer[0],
        embed=_path_of(base, base.get_input_embeddings()),
        ln_final=None,
        ln1=None,
        ln2=None,
        attention=None,
        mlp=None,
    )


def cannot_hook(model_type: str, reason: str) -> ModelError:
    """The error for a family that is not in the table."""
    return ModelError(
        f"models of type {model_type!r} cannot be hooked: {reason}; known types are "
        f"{', '.join(sorted(ARCHITECTURES))} (actstore/hooks/families/architectures.py says how to add one)"
    )


def _path_of(base: "nn.Module", wanted: "nn.Module") -> str:
    paths: dict[nn.Module, str] = {module: path for path, module in base.named_modules()}
    return paths[wanted]

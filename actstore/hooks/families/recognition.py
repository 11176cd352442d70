"""Recognising the family of a model by its configuration."""

from typing import Any

from actstore.errors import ModelError
from actstore.hooks.families.architectures import ARCHITECTURES, Architecture
from actstore.hooks.families.generic import generic_architecture


def architecture(config: Any) -> Architecture:
    """The table's entry for a configuration; for an unknown family, one that is made by looking at the model's modules.

    Raises:
        ModelError: models like this cannot be hooked.
    """
    _check_variant(config)
    try:
        return ARCHITECTURES[config.model_type]
    except KeyError:
        return generic_architecture(config)


def _check_variant(config: Any) -> None:
    """Refuse variants of a known family that its entry does not describe.

    Raises:
        ModelError: the model is such a variant; the message says which.
    """
    if config.model_type == "opt" and not config.do_layer_norm_before:
        raise ModelError(
            "this OPT model norms after attention and MLP (do_layer_norm_before is false, as in OPT-350m); only the "
            "other variants, which norm before them, can be hooked"
        )

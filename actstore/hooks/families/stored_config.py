"""Hook names and sizes from the configuration in a store. Anybody can have written it, so nothing in it is trusted."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import ActstoreError, HookError, ModelError
from actstore.hooks.families.config_sizes import check_sizes

if TYPE_CHECKING:
    from actstore.hooks.families.config import HookedConfig
    from actstore.hooks.naming.names import HookNames

UNKNOWN_MODEL: Final = "unknown"
"""Type of the model of activations that were imported without naming their model."""
_CODE: Final = ("auto_map", "trust_remote_code", "custom_pipelines", "quantization_config")
"""Fields that ask for code or further packages; hook names and sizes need none of them."""


def hooks_of_stored(fields: Mapping[str, Any]) -> "tuple[HookNames, HookedConfig]":
    """Hook names and sizes of a model; no code but that of transformers runs, and no weights are made.

    Raises:
        HookError: the activations were imported without saying of which model.
        ModelError: transformers does not know such a model, a field is not what it can be, or models like this cannot
            be hooked.
    """
    if fields.get("model_type") == UNKNOWN_MODEL:
        raise HookError(
            "these activations were imported without saying of which model; name a hook as `actstore info` does, or "
            "import them with the model"
        )
    from transformers import AutoConfig

    from actstore.hooks.families.model_names import hooks_of

    check_sizes(fields, "the configuration of the model in the store", "the store is damaged")
    wanted = {name: value for name, value in fields.items() if name not in _CODE}
    _check_names(wanted)
    model_type = wanted.pop("model_type", None)
    try:
        return hooks_of(AutoConfig.for_model(str(model_type), **wanted))
    except ActstoreError:
        raise
    except Exception as error:  # fields of any type can make transformers raise anything
        raise ModelError(
            f"the configuration of the model in the store, of type {str(model_type)[:100]!r}, cannot be used "
            f"({type(error).__name__}); the store is damaged, or it is of a newer version of transformers"
        ) from error


def _check_names(fields: Mapping[str, Any]) -> None:
    """Refuse fields that would replace a method of the configuration: it keeps unknown fields as attributes.

    Raises:
        ModelError: there is such a field.
    """
    from transformers import PretrainedConfig

    for name in fields:
        if name.startswith("__") or callable(getattr(PretrainedConfig, name, None)):
            raise ModelError(
                f"the configuration of the model in the store has a field {name[:100]!r}, which no model has; the "
                "store is damaged"
            )

"""Loading only the first layers of a model, under the configuration of the whole model."""

import copy
from typing import TYPE_CHECKING, Any

from actstore.hooks.families.architectures import base_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def class_with_first_layers(
    auto: Any, config: "PretrainedConfig", layers: str, n_layers: int, *, trust_remote_code: bool
) -> Any:
    """A class whose ``from_pretrained`` makes the model of a configuration without its later layers.

    The configuration stays as it is, because families compute with the number of layers: MiniCPM3 scales what every
    layer adds by it, and others choose by it which layers share keys or are of another kind. transformers reads only
    the weights of parameters that a model has, so those of the later layers never come into memory.

    Args:
        auto: ``AutoModel`` or ``AutoModelForCausalLM``.
        config: the configuration of the whole model.
        layers: path of the list of layers in the model without its head.
        n_layers: how many of them to keep.
        trust_remote_code: run code that comes with the model.
    """
    import torch

    with torch.device("meta"):
        whole = auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    kind: Any = type(whole)

    class FirstLayers(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            list_of_layers: Any = base_of(self).get_submodule(layers)
            del list_of_layers[n_layers:]
            remaining = {name for name, _ in self.named_parameters(remove_duplicate=False)}
            tied: dict[str, str] = self.all_tied_weights_keys
            for target, source in tuple(tied.items()):
                if not {target, source} <= remaining:
                    del tied[target]

    # transformers looks up settings of a model by the name of its class.
    FirstLayers.__name__, FirstLayers.__qualname__ = kind.__name__, kind.__qualname__
    FirstLayers.__module__ = kind.__module__
    return FirstLayers


def as_own_class(model: "nn.Module") -> None:
    """Give a model that `class_with_first_layers` made its ordinary class again."""
    model.__class__ = type(model).__mro__[1]

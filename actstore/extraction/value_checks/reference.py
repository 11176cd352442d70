"""The reference model of checks: the whole model, loaded by transformers alone, where memory allows."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from actstore.hooks.loading.pretrained import load_config, quiet_loading
from actstore.hooks.model import HookedModel
from actstore.memory import free_nbytes

if TYPE_CHECKING:
    import torch

Kind = Literal["whole", "loaded"]
_ROOM: Final = 1.2
"""Free memory that is required, as a multiple of the weights and states: allocators and kernels need some, too."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A model for plain forwards."""

    model: HookedModel
    """The model, wrapped to find its modules."""
    kind: Kind
    """``whole``: loaded by transformers alone, with all layers. ``loaded``: the same model that captures."""

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def reference_for(name: str, revision: str | None, model: HookedModel, batch: tuple[int, int]) -> Reference:
    """A reference that shares nothing with how ``model`` was loaded; ``model`` itself where memory is short.

    Args:
        name: Hub name or folder of the model.
        revision: branch, tag or commit on the Hub.
        model: the model that captures.
        batch: rows and positions of the forward.
    """
    return whole_model(name, revision, model.dtype, model.device, batch) or Reference(model, "loaded")


def whole_model(
    name: str, revision: str | None, dtype: "torch.dtype", device: "torch.device", batch: tuple[int, int]
) -> Reference | None:
    """The model as transformers loads it without any setting of ours; None if memory is short.

    Args:
        name: Hub name or folder of a model that has been loaded before.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights.
        device: device to run it on.
        batch: rows and positions of a forward.
    """
    import torch
    from transformers import AutoModelForCausalLM

    devices = {device, torch.device("cpu")}  # transformers reads weights into host memory first
    if _nbytes(load_config(name, revision=revision), dtype, batch) > min(
        free_nbytes(place) for place in devices
    ):
        return None
    with quiet_loading():
        whole: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    try:
        whole.to(device)
    except torch.OutOfMemoryError:  # another process took the memory
        return None
    return Reference(HookedModel(whole.eval().requires_grad_(False), check=False), "whole")


def _nbytes(config: Any, dtype: "torch.dtype", batch: tuple[int, int]) -> float:
    """Memory that must be free for the weights of a whole model and the hidden states of one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    n_weights = sum(weight.numel() for weight in whole.parameters())
    n_states: int = (config.num_hidden_layers + 1) * math.prod(batch) * config.hidden_size
    return _ROOM * float(n_weights + n_states) * dtype.itemsize

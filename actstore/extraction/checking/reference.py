"""The model that checks are made against: the whole one, loaded by transformers alone, where memory allows."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from actstore.extraction.memory import free_nbytes
from actstore.hooks.loading.pretrained import load_config, quiet_loading
from actstore.hooks.model import HookedModel

if TYPE_CHECKING:
    import torch

Kind = Literal["whole", "loaded"]
_ROOM: Final = 1.2
"""Memory that must be free, in sizes of what will be in it: allocators and kernels need some beside it."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A model for plain forwards."""

    model: HookedModel
    """Wrapped, so that it is known where its hooks are."""
    kind: Kind
    """``whole``: loaded by transformers alone, with all layers. ``loaded``: the very model that captures."""

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def reference_for(name: str, revision: str | None, model: HookedModel, batch: tuple[int, int]) -> Reference:
    """A reference that shares nothing with how ``model`` was loaded; ``model`` itself where memory is short.

    Args:
        name: Hub name or folder of the model.
        revision: branch, tag or commit on the Hub.
        model: the one that captures.
        batch: rows and positions of the forward that the reference is for.
    """
    return whole_model(name, revision, model.dtype, model.device, batch) or Reference(model, "loaded")


def whole_model(
    name: str, revision: str | None, dtype: "torch.dtype", device: "torch.device", batch: tuple[int, int]
) -> Reference | None:
    """The model as anybody gets it who loads it with transformers, without a setting of ours; None if memory is short.

    Args:
        name: Hub name or folder of a model that has been loaded before.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights.
        device: where it is to run.
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
    except torch.OutOfMemoryError:  # somebody else was faster
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

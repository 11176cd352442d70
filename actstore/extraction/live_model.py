"""A model that is in the memory of this process, as a job takes it."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import JobError, ModelError
from actstore.store.format.plan import IN_MEMORY
from actstore.store.format.shard import crc32c

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from actstore.hooks.model import HookedModel


class LiveModel:
    """A `HookedModel` that computes a store as it is now, with whatever weights somebody has put into it."""

    def __init__(self, given: Any) -> None:
        """
        Args:
            given: a `HookedModel`, or a model of transformers.

        Raises:
            ModelError: it cannot be hooked, or computes with more than its weights.
        """
        from actstore.hooks.model import HookedModel

        self.hooked: HookedModel = given if isinstance(given, HookedModel) else HookedModel(given)
        if self.hooked.has_functions or self.hooked.acts_to_saes:
            raise ModelError(
                "the model has functions or SAEs on its hooks, which a store does not go through; call reset_hooks() "
                "and reset_saes() first"
            )

    @cached_property
    def fingerprint(self) -> str:
        """The result of `memory_fingerprint` when it was first asked for.

        Raises:
            ModelError: some of the weights are not in memory.
        """
        return memory_fingerprint(self.hooked)

    @property
    def name(self) -> str:
        return self.hooked.cfg.model_name

    @property
    def config(self) -> "PretrainedConfig":
        config: PretrainedConfig = self.hooked.hf.config
        return config

    @property
    def n_embeddings(self) -> int:
        """Number of token ids that the model has embeddings for."""
        return int(self.hooked.hf.get_input_embeddings().weight.shape[0])

    @property
    def dtype(self) -> str:
        return str(self.hooked.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.hooked.device)

    def check_device(self, device: str | None) -> None:
        """Check that a device, if one is asked for, is where the model is.

        Raises:
            JobError: it is another one.
        """
        if device not in (None, self.device, self.device.partition(":")[0]):
            raise JobError(
                f"device {device} was asked for, and the model in memory is on {self.device}; leave device out, or "
                f"move the model: model.to({device!r})"
            )

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""
        return self.hooked.tokenizer if self.hooked.has_tokenizer else None

    @property
    def prepends_bos(self) -> bool:
        """Whether its text begins with the BOS token."""
        return bool(self.hooked.cfg.default_prepend_bos)


def memory_fingerprint(model: "HookedModel") -> str:
    """The fingerprint of weights in memory: ``memory:`` and a CRC-32C of the name, dtype, shape and bytes of each.

    Raises:
        ModelError: some of the weights are not in memory.
    """
    crc = 0
    for name, weight in sorted(model.hf.state_dict().items()):
        if not hasattr(weight, "dtype"):  # what a quantised module adds to its weights
            crc = crc32c(_bytes(f"{name}={weight!r}\n".encode()), crc)
            continue
        if weight.is_meta:
            raise ModelError(
                f"the weight {name} is not in memory but offloaded, so that it cannot be told from others; save the "
                "model to a folder, and give the folder"
            )
        crc = crc32c(_bytes(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode()), crc)
        crc = crc32c(_of_tensor(weight), crc)
    return f"{IN_MEMORY}{crc:08x}"


def _of_tensor(weight: "torch.Tensor") -> "np.ndarray[Any, Any]":
    import torch

    flat = weight.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy() if flat.numel() else _bytes(b"")


def _bytes(data: bytes) -> "np.ndarray[Any, Any]":
    return np.frombuffer(data, np.uint8)

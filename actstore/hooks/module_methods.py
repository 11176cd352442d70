"""The part of a hooked model that notebooks use as they use a module of PyTorch."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from actstore.errors import ModelError
from actstore.hooks.loaded_model import LoadedModel
from actstore.hooks.loading.device import usable_device

if TYPE_CHECKING:
    import torch
    from torch import nn


class ModuleMethods(LoadedModel):
    """Methods of ``torch.nn.Module``, of which most are those of the Hugging Face model; so are names in them."""

    training = False
    """A hooked model is always in evaluation mode."""

    @property
    def original_model(self) -> Any:
        """The Hugging Face model, ``hf``, under the name that it has in TransformerLens' Bridge."""
        return self.hf

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> Self:
        """Move the model to a device or another dtype, and return this object itself.

        Args:
            args: device, dtype or both, as for ``torch.nn.Module.to``.
            print_details: taken and ignored.
            kwargs: as for ``torch.nn.Module.to``.

        Raises:
            ModelError: the device is not there, or the model cannot be moved (quantised, offloaded).
        """
        del print_details
        for given in (*args, kwargs.get("device")):
            if isinstance(given, str):
                usable_device(given)
        try:
            self.hf.to(*args, **kwargs)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ModelError(f"the model cannot be moved: {error}") from error
        self.cfg.follow(self.device, self.dtype)
        return self

    def cuda(self, device: "int | torch.device | None" = None) -> Self:
        """Move the model to a GPU."""
        return self.to("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self) -> Self:
        """Move the model to the CPU."""
        return self.to("cpu")

    def mps(self) -> Self:
        """Move the model to a GPU of Apple."""
        return self.to("mps")

    def eval(self) -> Self:
        """Return this object itself, which is in evaluation mode."""
        self.hf.eval()
        return self

    def train(self, mode: bool = True) -> Self:
        """Return this object itself if ``mode`` is False.

        Raises:
            ModelError: ``mode`` is True.
        """
        if mode:
            raise ModelError(
                "in training mode dropout makes values random, so hooks are those of evaluation mode; leave train() "
                "out, and call model.hf.requires_grad_(True) to train weights"
            )
        return self.eval()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether parameters are trained; runs record a graph with ``grad=True`` only."""
        self.hf.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of parameters."""
        self.hf.zero_grad(set_to_none)

    def parameters(self, recurse: bool = True) -> "Iterator[nn.Parameter]":
        """The parameters of the Hugging Face model."""
        parameters: Iterator[nn.Parameter] = self.hf.parameters(recurse)
        return parameters

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> "Iterator[tuple[str, nn.Parameter]]":
        """The parameters of the Hugging Face model under its names; `tl_named_parameters` has TransformerLens'."""
        named: Iterator[tuple[str, nn.Parameter]] = self.hf.named_parameters(
            prefix, recurse, remove_duplicate
        )
        return named

    def modules(self) -> "Iterator[nn.Module]":
        """The modules of the Hugging Face model."""
        modules: Iterator[nn.Module] = self.hf.modules()
        return modules

    def named_modules(self) -> "Iterator[tuple[str, nn.Module]]":
        """The modules of the Hugging Face model under its names."""
        named: Iterator[tuple[str, nn.Module]] = self.hf.named_modules()
        return named

    def state_dict(self) -> "Mapping[str, torch.Tensor]":
        """The weights of the Hugging Face model under its names."""
        weights: Mapping[str, torch.Tensor] = self.hf.state_dict()
        return weights

    def load_state_dict(self, state_dict: "Mapping[str, torch.Tensor]", strict: bool = True) -> Any:
        """Take weights under the names of the Hugging Face model."""
        return self.hf.load_state_dict(state_dict, strict=strict)

    def tl_parameters(self) -> "dict[str, torch.Tensor]":
        """The weights that the model has, under TransformerLens' names: ``blocks.0.attn.W_Q``, ``unembed.W_U``, ..."""
        weights: dict[str, torch.Tensor] = {}

        def put(path: str, holder: Any, *names: str) -> None:
            for name in names:
                try:
                    weights[f"{path}.{name}"] = getattr(holder, name)
                except ModelError:  # this model does not have it
                    continue

        put("embed", self.weights, "W_E")
        put("pos_embed", self.weights, "W_pos")
        for layer, block in enumerate(self.weights.blocks):
            put(f"blocks.{layer}.attn", block.attn, *(f"{kind}_{one}" for one in "QKVO" for kind in "Wb"))
            put(
                f"blocks.{layer}.mlp",
                block.mlp,
                *(f"{kind}_{one}" for one in ("in", "gate", "out") for kind in "Wb"),
            )
        put("unembed", self.weights, "W_U", "b_U")
        return weights

    def tl_named_parameters(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """The items of `tl_parameters`."""
        return iter(self.tl_parameters().items())

"""The weights of one layer, under the names and in the shapes of TransformerLens."""
# ruff: noqa: N802 - names of TransformerLens

from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.families.architectures import Architecture
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.families.site import Part, Site, sites_in_layer
from actstore.hooks.weights.factored_matrix import FactoredMatrix
from actstore.hooks.weights.norms import NormWeights, norm_weights
from actstore.hooks.weights.used_weights import bias, projection

if TYPE_CHECKING:
    import torch
    from torch import nn


class BlockWeights:
    """Weights of one layer: its attention, its MLP and its norms."""

    def __init__(
        self, module: "nn.Module", architecture: Architecture, cfg: HookedConfig, layer: int
    ) -> None:
        self._module = module
        self._architecture = architecture
        self._layer = layer
        self._sites = sites_in_layer(architecture, cfg, layer)
        self._undefined = architecture.undefined(cfg.original, layer)
        self.attn = AttentionWeights(self, cfg)
        self.mlp = MlpWeights(self)

    @property
    def ln1(self) -> NormWeights:
        return self._norm("ln1", self._architecture.ln1)

    @property
    def ln2(self) -> NormWeights:
        return self._norm("ln2", self._architecture.ln2)

    @property
    def ln1_post(self) -> NormWeights:
        """The norm after attention (Gemma-2 and 3)."""
        return self._norm("ln1_post", self._architecture.ln1_post)

    @property
    def ln2_post(self) -> NormWeights:
        """The norm after the MLP (Gemma-2 and 3)."""
        return self._norm("ln2_post", self._architecture.ln2_post)

    def check_has(self, leaf: str, weight: str) -> None:
        """Refuse a weight if the layer does not have the hook of its values.

        Raises:
            ModelError: the layer does not have the hook; the message says why.
        """
        if leaf in self._undefined:
            raise ModelError(f"layer {self._layer} of this model has no {weight}: {self._undefined[leaf]}")

    def has(self, leaf: str) -> bool:
        """Whether the layer has a hook."""
        return leaf in self._sites

    def find(self, leaf: str, weight: str) -> tuple[Any, Part]:
        """The module whose input or output a hook shows, and the part of that value.

        Raises:
            ModelError: the layer does not have the hook; the message says why.
        """
        self.check_has(leaf, weight)
        site = self._sites[leaf]
        assert isinstance(site, Site)
        return self._module.get_submodule(site.module), site.part

    def _norm(self, name: str, path: str | None) -> NormWeights:
        if path is None:
            self.check_has(f"{name}.hook_scale", name)
            raise ModelError(f"layer {self._layer} of this model has no {name}")
        return norm_weights(self._module.get_submodule(path), self._architecture.norm)


class AttentionWeights:
    """Weights of attention in one layer."""

    def __init__(self, block: BlockWeights, cfg: HookedConfig) -> None:
        self._block = block
        self._n_heads = cfg.n_heads

    @property
    def W_Q(self) -> "torch.Tensor":
        """Weight of queries [h, d, dh], before their norm and rotation."""
        return self._reading("q", "W_Q")

    @property
    def W_K(self) -> "torch.Tensor":
        """Weight of keys [h, d, dh], before their norm and rotation; a copy where heads share keys.

        There is one for each query head, even where several share keys. There, TransformerLens' Bridge has one for each
        head of keys: ``W_K[:: n_heads // n_key_value_heads]``.
        """
        return self._reading("k", "W_K")

    @property
    def W_V(self) -> "torch.Tensor":
        """Weight of values [h, d, dh], one for each query head as in `W_K`; a copy where heads share values."""
        return self._reading("v", "W_V")

    @property
    def W_O(self) -> "torch.Tensor":
        """Weight of the output projection [h, dh, d]."""
        module, _ = self._block.find("attn.hook_z", "attn.W_O")
        weight = projection(module)
        return weight.view(self._n_heads, -1, weight.shape[-1])

    @property
    def b_Q(self) -> "torch.Tensor":
        """Bias of queries [h, dh]."""
        return self._bias("q", "b_Q")

    @property
    def b_K(self) -> "torch.Tensor":
        """Bias of keys [h, dh]."""
        return self._bias("k", "b_K")

    @property
    def b_V(self) -> "torch.Tensor":
        """Bias of values [h, dh]."""
        return self._bias("v", "b_V")

    @property
    def b_O(self) -> "torch.Tensor":
        """Bias of the output projection [d]."""
        return bias(self._block.find("attn.hook_z", "attn.b_O")[0])

    @property
    def written_biases(self) -> "torch.Tensor":
        """(ln1.b @ W_V + b_V) @ W_O [h, d]: what each head writes at any position, since its pattern sums to 1."""
        import torch

        weight = self.W_V
        constant = self.b_V + self._block.ln1.b.to(weight.dtype) @ weight
        return torch.einsum("he,hed->hd", constant, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q @ W_K^T [h, d, d], which gives the unscaled score of two values after ln1.

        Rotation, biases, and norms of queries and keys (Qwen3, Gemma-3), which act between the factors, are left out.
        """
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V @ W_O [h, d, d], which leads from values after ln1 to the output of a head.

        In Gemma-2 and 3 another norm, ln1_post, lies between the sum over heads and the residual stream.
        """
        return FactoredMatrix(self.W_V, self.W_O)

    def _reading(self, one: str, name: str) -> "torch.Tensor":
        module, part = self._block.find(f"attn.hook_{one}", f"attn.{name}")
        return self._for_each_head(part.view(projection(module)).movedim(-2, 0))

    def _bias(self, one: str, name: str) -> "torch.Tensor":
        module, part = self._block.find(f"attn.hook_{one}", f"attn.{name}")
        return self._for_each_head(part.view(bias(module)))

    def _for_each_head(self, value: "torch.Tensor") -> "torch.Tensor":
        """A value [heads of keys, ...] repeated to [h, ...]."""
        repeats = self._n_heads // value.shape[0]
        return value if repeats == 1 else value.repeat_interleave(repeats, 0)


class MlpWeights:
    """Weights of the MLP in one layer.

    In a gated MLP, W_gate leads into the activation function (mlp.hook_pre), and W_in to what its result is multiplied
    by (mlp.hook_pre_linear). In any other MLP, W_in leads into the activation function, and there is no W_gate.
    """

    def __init__(self, block: BlockWeights) -> None:
        self._block = block
        self._is_gated = block.has("mlp.hook_pre_linear")

    @property
    def is_mixture(self) -> bool:
        """Whether this is a mixture of experts, which has none of the weights below."""
        return self._block.has("mlp.hook_expert_weights")

    @property
    def W_in(self) -> "torch.Tensor":
        """Weight of the input [d, m]; see the class."""
        module, part = self._find_in("W_in")
        return part.view(projection(module))

    @property
    def W_gate(self) -> "torch.Tensor":
        """Weight of the gate [d, m]; see the class."""
        module, part = self._find_gate("W_gate")
        return part.view(projection(module))

    @property
    def W_out(self) -> "torch.Tensor":
        """Weight of the output [m, d]."""
        return projection(self._block.find("mlp.hook_post", "mlp.W_out")[0])

    @property
    def b_in(self) -> "torch.Tensor":
        """Bias of the input [m]."""
        module, part = self._find_in("b_in")
        return part.view(bias(module))

    @property
    def b_gate(self) -> "torch.Tensor":
        """Bias of the gate [m]."""
        module, part = self._find_gate("b_gate")
        return part.view(bias(module))

    @property
    def b_out(self) -> "torch.Tensor":
        """Bias of the output [d]."""
        return bias(self._block.find("mlp.hook_post", "mlp.b_out")[0])

    def _find_in(self, name: str) -> tuple[Any, Part]:
        leaf = "mlp.hook_pre_linear" if self._is_gated else "mlp.hook_pre"
        return self._block.find(leaf, f"mlp.{name}")

    def _find_gate(self, name: str) -> tuple[Any, Part]:
        self._block.check_has("mlp.hook_pre_linear", f"mlp.{name}")
        return self._block.find("mlp.hook_pre", f"mlp.{name}")

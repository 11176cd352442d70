"""The weights of a model, under the names and in the shapes of TransformerLens.

Values are rows: ``q = x @ W_Q[head] + b_Q[head]``. What belongs to one layer (``blocks[3].attn.W_Q``) is a view of the
model's parameters wherever their layout allows, so that writing to it changes the model. What is stacked over the
layers is a copy, made anew each time. Weights are as the model has them: no norm is folded into them, but see
`Weights.folded_b_U`.
"""
# ruff: noqa: N802, N815 - names of TransformerLens

from collections.abc import Callable
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import ModelError
from actstore.hooks.families.architectures import Architecture
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.weights.block_weights import BlockWeights
from actstore.hooks.weights.factored_matrix import FactoredMatrix
from actstore.hooks.weights.norms import NormWeights, norm_weights
from actstore.hooks.weights.used_weights import bias, embedding, projection

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Stacked(property):
    """A weight of all layers in one tensor."""

    def __init__(self, path: str, doc: str) -> None:
        weight_of = attrgetter(path)

        def stacked(weights: "Weights") -> "torch.Tensor":
            import torch

            layers = [weight_of(block) for block in weights.blocks]
            # Layers of one model can be on several devices.
            return torch.stack([weight.to(layers[0].device) for weight in layers])

        super().__init__(stacked, doc=doc)

    if TYPE_CHECKING:

        def __get__(self, weights: Any, kind: Any = None, /) -> torch.Tensor: ...  # type: ignore[override]


class Weights:
    """Weights of a whole model; d is d_model, dh d_head, m d_mlp, h heads, V the vocabulary, L layers."""

    W_Q = _Stacked("attn.W_Q", "Weights of queries [L, h, d, dh].")
    W_K = _Stacked(
        "attn.W_K", "Weights of keys [L, h, d, dh], one for each query head; equal where heads share keys."
    )
    W_V = _Stacked(
        "attn.W_V",
        "Weights of values [L, h, d, dh], one for each query head; equal where heads share values.",
    )
    W_O = _Stacked("attn.W_O", "Weights of the output projections [L, h, dh, d].")
    b_Q = _Stacked("attn.b_Q", "Biases of queries [L, h, dh].")
    b_K = _Stacked("attn.b_K", "Biases of keys [L, h, dh].")
    b_V = _Stacked("attn.b_V", "Biases of values [L, h, dh].")
    b_O = _Stacked("attn.b_O", "Biases of the output projections [L, d].")
    W_in = _Stacked("mlp.W_in", "Input weights of the MLPs [L, d, m]; see `MlpWeights`.")
    W_gate = _Stacked("mlp.W_gate", "Gate weights of the MLPs [L, d, m]; see `MlpWeights`.")
    W_out = _Stacked("mlp.W_out", "Output weights of the MLPs [L, m, d].")
    b_in = _Stacked("mlp.b_in", "Input biases of the MLPs [L, m].")
    b_gate = _Stacked("mlp.b_gate", "Gate biases of the MLPs [L, m].")
    b_out = _Stacked("mlp.b_out", "Output biases of the MLPs [L, d].")

    def __init__(
        self,
        base: "nn.Module",
        head: "Callable[[], nn.Module] | None",
        architecture: Architecture,
        cfg: HookedConfig,
    ) -> None:
        """Give a view of a model; nothing is copied.

        Args:
            base: the model without a head; it may have been loaded with fewer layers.
            head: returns the output embedding; None if the model was loaded without it.
            architecture: the entry of its family in the table.
            cfg: its sizes.
        """
        self._base: Any = base
        self._head = head
        self._architecture = architecture
        self._cfg = cfg

    @cached_property
    def blocks(self) -> "tuple[BlockWeights, ...]":
        """Views of each layer's weights."""
        layers: Any = self._base.get_submodule(self._architecture.layers)
        return tuple(
            BlockWeights(module, self._architecture, self._cfg, layer) for layer, module in enumerate(layers)
        )

    @property
    def W_E(self) -> "torch.Tensor":
        """Embedding [V, d]: ``W_E[tokens]`` is hook_embed. A copy for Gemma, which scales what it looks up."""
        module = embedding(self._base.get_submodule(self._architecture.embed))
        weight: torch.Tensor = module.weight
        scale = getattr(module, "embed_scale", None)
        if scale is None or (isinstance(scale, float) and scale == 1.0):
            return weight
        factor: float | torch.Tensor = scale if isinstance(scale, float) else scale.to(weight.dtype)
        return weight * factor

    @property
    def W_pos(self) -> "torch.Tensor":
        """Position embedding [n, d]: row i is hook_pos_embed at position i."""
        if self._architecture.pos_embed is None:
            reason = self._architecture.undefined_outside()["hook_pos_embed"]
            raise ModelError(f"this model has no W_pos: {reason}")
        module = embedding(self._base.get_submodule(self._architecture.pos_embed))
        weight: torch.Tensor = module.weight[getattr(module, "offset", 0) :]  # OPT begins at row 2
        return weight

    @property
    def W_U(self) -> "torch.Tensor":
        """Output embedding [d, V]."""
        return projection(self._loaded_head())

    @property
    def b_U(self) -> "torch.Tensor":
        """Bias of the output embedding [V]."""
        return bias(self._loaded_head())

    @property
    def ln_final(self) -> NormWeights:
        if self._architecture.ln_final is None:
            reason = self._architecture.undefined_outside()["ln_final.hook_scale"]
            raise ModelError(f"this model has no ln_final: {reason}")
        return norm_weights(self._base.get_submodule(self._architecture.ln_final), self._architecture.norm)

    @property
    def folded_W_U(self) -> "torch.Tensor":
        """Not offered.

        Raises:
            ModelError: always. `ActivationCache.apply_ln_to_stack` applies the gain of the final norm, and its result
                goes with W_U; with this weight the gain would be applied twice.
        """
        raise ModelError(
            "there is no folded_W_U: apply_ln_to_stack applies the gain of the final norm, so multiply its result by "
            "W_U; multiply ln_final.hook_normalized, which is before the gain, by ln_final.w[:, None] * W_U"
        )

    @property
    def folded_b_U(self) -> "torch.Tensor":
        """b_U + ln_final.b @ W_U [V] in float32: the logits of a residual stream of zeros.

        With these, the direct attributions of all parts of the stream add up to the logits (before a softcap).
        """
        return self.b_U.float() + self.ln_final.b.float() @ self.W_U.float()

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q @ W_K^T [L, h, d, d]; see `AttentionWeights.QK`."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V @ W_O [L, h, d, d]; see `AttentionWeights.OV`."""
        return FactoredMatrix(self.W_V, self.W_O)

    def all_head_labels(self) -> list[str]:
        """``L0H0``, ``L0H1``, ... of every head."""
        return [f"L{layer}H{head}" for layer in range(len(self.blocks)) for head in range(self._cfg.n_heads)]

    def accumulated_bias(
        self,
        layer: int,
        mlp_input: bool = False,
        include_mlp_biases: bool = True,
        fold_value_biases: bool = False,
    ) -> "torch.Tensor":
        """The sum of all biases of attention and MLP that the residual stream into a layer contains [d], in float32.

        Experts of a mixture have no bias. Where a norm follows (Gemma-2 and 3), biases do not reach the stream as they
        are; those models have none unless configured so.

        Args:
            layer: 0 up to the number of layers, which means all of them.
            mlp_input: go on to the input of the layer's MLP, and add the bias of its attention.
            include_mlp_biases: add the biases of MLPs to those of attention.
            fold_value_biases: add the biases of values and of the norm before them, times W_O, which otherwise count
                as written by heads.

        Raises:
            ValueError: there is no such layer.
            ModelError: ``mlp_input`` is given, and the MLP of this model does not read the output of attention.
        """
        last = len(self.blocks) - 1 if mlp_input else len(self.blocks)
        if not 0 <= layer <= last:
            raise ValueError(f"layer is {layer}; it must be 0 to {last}")
        total = self.W_E.new_zeros(self._cfg.d_model).float()
        for block in self.blocks[:layer]:
            total = total + _attention_bias(block, fold_value_biases)
            if include_mlp_biases and not block.mlp.is_mixture:
                total = total + block.mlp.b_out
        if mlp_input:
            self.blocks[layer].check_has("hook_mlp_in", "stream between attention and MLP")
            total = total + _attention_bias(self.blocks[layer], fold_value_biases)
        return total

    def all_composition_scores(self, mode: Literal["Q", "K", "V"]) -> "torch.Tensor":
        """How much each head reads of the output of each head in an earlier layer [L, h, L, h]: (writer, reader).

        |OV W| / (|OV| |W|) in Frobenius norms, where W is what the later head reads with: QK for its queries, QK^T for
        its keys, OV for its values; 0 where the writing layer is not earlier. See "Q-, K- and V-composition" in
        https://transformer-circuits.pub/2021/framework/index.html

        Raises:
            ValueError: the mode is not Q, K or V.
        """
        import torch

        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode is {mode!r}; it must be Q, K or V")
        writer = self.OV
        reader = writer if mode == "V" else self.QK if mode == "Q" else self.QK.T
        # Rotations of the outer sides of a product keep its norm, and make it d_head by d_head.
        left, right = writer.collapse_l(), reader.collapse_r()
        writer_norm, reader_norm = (
            torch.linalg.matrix_norm(left),
            torch.linalg.matrix_norm(right),
        )
        n_layers, n_heads = writer_norm.shape
        scores = left.new_zeros(n_layers, n_heads, n_layers, n_heads)
        for early in range(n_layers):
            for late in range(early + 1, n_layers):
                product = torch.einsum("wnd,rdm->wrnm", left[early], right[late])
                norm = torch.linalg.matrix_norm(product)
                scores[early, :, late] = norm / (writer_norm[early][:, None] * reader_norm[late][None])
        return scores

    def _loaded_head(self) -> Any:
        if self._head is None:
            raise ModelError(
                "this model was loaded without its language-model head; load it with the head to see W_U and b_U"
            )
        return self._head()


def _attention_bias(block: BlockWeights, fold_value_biases: bool) -> "torch.Tensor":
    """Bias of attention [d]; with ``fold_value_biases``, what its heads write of the biases of values as well."""
    bias = block.attn.b_O
    return bias + block.attn.written_biases.sum(0) if fold_value_biases else bias

"""The weights of a model, under the names and in the shapes of TransformerLens.

Values are rows: ``q = x @ W_Q[head] + b_Q[head]``. What belongs to one layer (``blocks[3].attn.W_Q``) is a view of the
model's parameters wherever their layout allows, so that writing to it changes the model. What is stacked over the
layers is a copy, made anew each time. Weights are as the model has them: no norm is folded into them, but see
`Weights.folded_W_U`.
"""
# ruff: noqa: N802, N815 - names of TransformerLens

from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import ModelError
from actstore.hooks.architecture import Architecture
from actstore.hooks.config import HookedConfig
from actstore.hooks.factored_matrix import FactoredMatrix
from actstore.hooks.site import Part, Site, sites_in_layer
from actstore.hooks.taps import Norm, projection

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, eq=False)
class NormWeights:
    """What a norm does to a normalized value: ``value * w + b``."""

    w: "torch.Tensor"
    """[d], the factor itself: 1 + weight for Gemma, then in float32 as the model computes it."""
    b: "torch.Tensor"
    """[d], zeros if there is none."""


class _Stacked(property):
    """A weight of all layers in one tensor."""

    def __init__(self, path: str, doc: str) -> None:
        of = attrgetter(path)

        def stacked(weights: "Weights") -> "torch.Tensor":
            import torch

            return torch.stack([of(block) for block in weights.blocks])

        super().__init__(stacked, doc=doc)

    if TYPE_CHECKING:

        def __get__(self, weights: Any, kind: Any = None, /) -> torch.Tensor: ...  # type: ignore[override]


class Weights:
    """Weights of a whole model; d is d_model, dh d_head, m d_mlp, h heads, V the vocabulary, L layers."""

    W_Q = _Stacked("attn.W_Q", "[L, h, d, dh].")
    W_K = _Stacked("attn.W_K", "[L, h, d, dh]; heads that share keys have equal ones.")
    W_V = _Stacked("attn.W_V", "[L, h, d, dh]; heads that share values have equal ones.")
    W_O = _Stacked("attn.W_O", "[L, h, dh, d].")
    b_Q = _Stacked("attn.b_Q", "[L, h, dh].")
    b_K = _Stacked("attn.b_K", "[L, h, dh].")
    b_V = _Stacked("attn.b_V", "[L, h, dh].")
    b_O = _Stacked("attn.b_O", "[L, d].")
    W_in = _Stacked("mlp.W_in", "[L, d, m]; see `MlpWeights`.")
    W_gate = _Stacked("mlp.W_gate", "[L, d, m]; see `MlpWeights`.")
    W_out = _Stacked("mlp.W_out", "[L, m, d].")
    b_in = _Stacked("mlp.b_in", "[L, m].")
    b_gate = _Stacked("mlp.b_gate", "[L, m].")
    b_out = _Stacked("mlp.b_out", "[L, d].")

    def __init__(
        self, base: "nn.Module", head: "nn.Module | None", architecture: Architecture, cfg: HookedConfig
    ) -> None:
        """Look at a model; nothing is copied.

        Args:
            base: the model without a head; it may have been loaded with fewer layers.
            head: output embedding, if it was loaded.
            architecture: the entry of its family.
            cfg: its sizes.
        """
        self._base: Any = base
        self._head: Any = head
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
        module = self._base.get_submodule(self._architecture.embed)
        weight: torch.Tensor = module.weight
        scale = getattr(module, "embed_scale", None)
        return weight if scale is None else weight * scale.to(weight.dtype)

    @property
    def W_pos(self) -> "torch.Tensor":
        """Position embedding [n, d]: row i is hook_pos_embed at position i."""
        if self._architecture.pos_embed is None:
            reason = self._architecture.undefined_outside()["hook_pos_embed"]
            raise ModelError(f"this model has no W_pos: {reason}")
        module = self._base.get_submodule(self._architecture.pos_embed)
        weight: torch.Tensor = module.weight[getattr(module, "offset", 0) :]  # OPT begins at row 2
        return weight

    @property
    def W_U(self) -> "torch.Tensor":
        """Output embedding [d, V]."""
        return projection(self._loaded_head())

    @property
    def b_U(self) -> "torch.Tensor":
        """Bias of the output embedding [V]."""
        return _bias(self._loaded_head())

    @property
    def ln_final(self) -> NormWeights:
        if self._architecture.ln_final is None:
            reason = self._architecture.undefined_outside()["ln_final.hook_scale"]
            raise ModelError(f"this model has no ln_final: {reason}")
        return _norm(self._base.get_submodule(self._architecture.ln_final), self._architecture.norm)

    @property
    def folded_W_U(self) -> "torch.Tensor":
        """diag(ln_final.w) @ W_U [d, V] in float32, a copy: from a normalized residual stream to logits.

        Direct logit attribution projects parts of the residual stream, divided by ln_final.hook_scale, onto this. The
        raw W_U would leave out the gain of the final norm, which differs between directions, and so rank parts wrongly.
        ``ln_final.hook_normalized @ folded_W_U + folded_b_U`` are the logits, before a softcap (Gemma-2).
        """
        return self.ln_final.w.float()[:, None] * self.W_U.float()

    @property
    def folded_b_U(self) -> "torch.Tensor":
        """b_U + ln_final.b @ W_U [V] in float32: the logits of no residual stream at all."""
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
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> "torch.Tensor":
        """What biases of attention and MLP alone have added to the residual stream into a layer [d], in float32.

        Experts of a mixture have no bias. Where a norm follows (Gemma-2 and 3), biases do not reach the stream as they
        are; those models have none unless configured so.

        Args:
            layer: 0 up to the number of layers, which means all of them.
            mlp_input: up to the input of the layer's MLP, so with the bias of its attention.
            include_mlp_biases: not only those of attention.

        Raises:
            ValueError: there is no such layer.
            ModelError: ``mlp_input``, and the MLP of this model does not read what its attention gives.
        """
        last = len(self.blocks) - 1 if mlp_input else len(self.blocks)
        if not 0 <= layer <= last:
            raise ValueError(f"layer is {layer}; it must be 0 to {last}")
        total = self.W_E.new_zeros(self._cfg.d_model).float()
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O
            if include_mlp_biases and not block.mlp.is_mixture:
                total = total + block.mlp.b_out
        if mlp_input:
            self.blocks[layer].check_has("hook_mlp_in", "stream between attention and MLP")
            total = total + self.blocks[layer].attn.b_O
        return total

    def all_composition_scores(self, mode: Literal["Q", "K", "V"]) -> "torch.Tensor":
        """How much each head reads of what each earlier one writes [L, h, L, h]: (writing head, reading head).

        |OV W| / (|OV| |W|) in Frobenius norms, where W is what the later head reads with: QK for its queries, QK^T for
        its keys, OV for its values; 0 where the writing layer is not earlier. See "Q-, K- and V-composition" in
        https://transformer-circuits.pub/2021/framework/index.html

        Raises:
            ValueError: the mode is none of these.
        """
        import torch

        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode is {mode!r}; it must be Q, K or V")
        writer = self.OV
        reader = writer if mode == "V" else self.QK if mode == "Q" else self.QK.T
        # Turning the outer sides of a product does not change its norm, and makes it d_head by d_head.
        left, right = writer.collapse_l(), reader.collapse_r()
        writer_norm, reader_norm = torch.linalg.matrix_norm(left), torch.linalg.matrix_norm(right)
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
        return self._head


class BlockWeights:
    """Weights of one layer."""

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
        """Norm of what attention gives (Gemma-2 and 3)."""
        return self._norm("ln1_post", self._architecture.ln1_post)

    @property
    def ln2_post(self) -> NormWeights:
        """Norm of what the MLP gives (Gemma-2 and 3)."""
        return self._norm("ln2_post", self._architecture.ln2_post)

    def check_has(self, leaf: str, weight: str) -> None:
        """Refuse a weight whose values have no hook.

        Raises:
            ModelError: there is no such hook; the message says why.
        """
        if leaf in self._undefined:
            raise ModelError(f"layer {self._layer} of this model has no {weight}: {self._undefined[leaf]}")

    def has(self, leaf: str) -> bool:
        """Whether the layer has a hook."""
        return leaf in self._sites

    def find(self, leaf: str, weight: str) -> tuple[Any, Part]:
        """The module whose input or output a hook is, and the part of it.

        Raises:
            ModelError: see `check_has`.
        """
        self.check_has(leaf, weight)
        site = self._sites[leaf]
        assert isinstance(site, Site)
        return self._module.get_submodule(site.module), site.part

    def _norm(self, name: str, path: str | None) -> NormWeights:
        if path is None:
            self.check_has(f"{name}.hook_scale", name)
            raise ModelError(f"layer {self._layer} of this model has no {name}")
        return _norm(self._module.get_submodule(path), self._architecture.norm)


class AttentionWeights:
    """Weights of attention in one layer."""

    def __init__(self, block: BlockWeights, cfg: HookedConfig) -> None:
        self._block = block
        self._n_heads = cfg.n_heads

    @property
    def W_Q(self) -> "torch.Tensor":
        """[h, d, dh], before norms of queries and rotation."""
        return self._reading("q", "W_Q")

    @property
    def W_K(self) -> "torch.Tensor":
        """[h, d, dh], before norms of keys and rotation; a copy where heads share keys."""
        return self._reading("k", "W_K")

    @property
    def W_V(self) -> "torch.Tensor":
        """[h, d, dh]; a copy where heads share values."""
        return self._reading("v", "W_V")

    @property
    def W_O(self) -> "torch.Tensor":
        """[h, dh, d]."""
        module, _ = self._block.find("attn.hook_z", "attn.W_O")
        weight = projection(module)
        return weight.view(self._n_heads, -1, weight.shape[-1])

    @property
    def b_Q(self) -> "torch.Tensor":
        """[h, dh]."""
        return self._bias("q", "b_Q")

    @property
    def b_K(self) -> "torch.Tensor":
        """[h, dh]."""
        return self._bias("k", "b_K")

    @property
    def b_V(self) -> "torch.Tensor":
        """[h, dh]."""
        return self._bias("v", "b_V")

    @property
    def b_O(self) -> "torch.Tensor":
        """[d]."""
        return _bias(self._block.find("attn.hook_z", "attn.b_O")[0])

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q @ W_K^T [h, d, d]: scores of pairs of values after ln1, not scaled.

        Without rotation, biases, and norms of queries and keys (Qwen3, Gemma-3), which act between the two factors.
        """
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V @ W_O [h, d, d]: from values after ln1 to what a head gives.

        In Gemma-2 and 3 another norm, ln1_post, lies between the sum over heads and the residual stream.
        """
        return FactoredMatrix(self.W_V, self.W_O)

    def _reading(self, one: str, name: str) -> "torch.Tensor":
        module, part = self._block.find(f"attn.hook_{one}", f"attn.{name}")
        return self._for_each_head(part.view(projection(module)).movedim(-2, 0))

    def _bias(self, one: str, name: str) -> "torch.Tensor":
        module, part = self._block.find(f"attn.hook_{one}", f"attn.{name}")
        return self._for_each_head(part.view(_bias(module)))

    def _for_each_head(self, value: "torch.Tensor") -> "torch.Tensor":
        """[h or kv heads, ...] as [h, ...]."""
        repeats = self._n_heads // value.shape[0]
        return value if repeats == 1 else value.repeat_interleave(repeats, 0)


class MlpWeights:
    """Weights of the MLP in one layer.

    In a gated MLP, W_gate leads to the activation function (mlp.hook_pre) and W_in to the factor of its result
    (mlp.hook_pre_linear). In any other, W_in leads to the activation function, and there is no W_gate.
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
        """[d, m]."""
        module, part = self._find_in("W_in")
        return part.view(projection(module))

    @property
    def W_gate(self) -> "torch.Tensor":
        """[d, m]."""
        module, part = self._find_gate("W_gate")
        return part.view(projection(module))

    @property
    def W_out(self) -> "torch.Tensor":
        """[m, d]."""
        return projection(self._block.find("mlp.hook_post", "mlp.W_out")[0])

    @property
    def b_in(self) -> "torch.Tensor":
        """[m]."""
        module, part = self._find_in("b_in")
        return part.view(_bias(module))

    @property
    def b_gate(self) -> "torch.Tensor":
        """[m]."""
        module, part = self._find_gate("b_gate")
        return part.view(_bias(module))

    @property
    def b_out(self) -> "torch.Tensor":
        """[d]."""
        return _bias(self._block.find("mlp.hook_post", "mlp.b_out")[0])

    def _find_in(self, name: str) -> tuple[Any, Part]:
        leaf = "mlp.hook_pre_linear" if self._is_gated else "mlp.hook_pre"
        return self._block.find(leaf, f"mlp.{name}")

    def _find_gate(self, name: str) -> tuple[Any, Part]:
        self._block.check_has("mlp.hook_pre_linear", f"mlp.{name}")
        return self._block.find("mlp.hook_pre", f"mlp.{name}")


def _bias(module: Any) -> "torch.Tensor":
    """Bias [out] of a linear module, zeros if it has none."""
    bias: torch.Tensor | None = module.bias
    return bias if bias is not None else module.weight.new_zeros(projection(module).shape[-1])


def _norm(module: Any, kind: Norm) -> NormWeights:
    weight: torch.Tensor = module.weight
    bias: torch.Tensor | None = getattr(module, "bias", None)
    return NormWeights(
        1.0 + weight.float() if kind == "rms_plus_one" else weight,
        weight.new_zeros(weight.shape) if bias is None else bias,
    )

"""The sizes of a model under the names of TransformerLens' HookedTransformerConfig."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from actstore.hooks.families.architectures import Architecture
from actstore.hooks.naming.hook_points import Point

if TYPE_CHECKING:
    import torch

SHARED_KEYS: Final = (
    "heads of this model share keys and values, so none has an input of its own; hook_q_input, hook_k_input and "
    "hook_v_input have one for each head of queries, keys and values"
)
"""Why a model with grouped queries has no ``hook_attn_in``."""


@dataclass(frozen=True)
class HookedConfig:
    """The sizes of a model, as in ``model.cfg``."""

    model_name: str
    model_type: str
    """``config.model_type`` of Hugging Face, which chooses the architecture."""
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    """Equal to ``n_heads`` where every query head has its own keys."""
    d_head: int
    d_mlp: int | None
    """Neurons of an MLP; None where their number is not known."""
    d_vocab: int
    n_ctx: int | None
    """Most tokens in a row that the model is made for; None if its configuration names no limit."""
    act_fn: str | None
    normalization_type: str
    """``LN`` or ``RMS``. Weights are never folded into other weights, so there is no ``LNPre``."""
    positional_embedding_type: str
    """``standard`` (learned, added) or ``rotary``."""
    eps: float
    """Epsilon of every norm."""
    gated_mlp: bool
    parallel_attn_mlp: bool
    num_experts: int | None = None
    experts_per_token: int | None = None
    window_size: int | None = None
    """Number of positions that a layer with a sliding window attends to."""
    attn_scores_soft_cap: float | None = None
    output_logits_soft_cap: float | None = None
    default_prepend_bos: bool | None = None
    """Whether text begins with the BOS token unless told otherwise; None without a tokenizer."""
    device: str = "cpu"
    """Device of the model; functions of TransformerLens read it here."""
    dtype: "torch.dtype | None" = None
    """Dtype of weights and values; None where no model is loaded."""
    original: Any = None
    """The configuration of Hugging Face."""

    @classmethod
    def of(cls, config: Any, architecture: Architecture, *, name: str | None = None) -> Self:
        """Read the sizes from a Hugging Face configuration."""

        def value_of(name: str) -> Any:
            try:
                return getattr(config, name, None)
            except RuntimeError:  # raised for a value that differs from layer to layer
                return None

        def first(*names: str, default: Any = None) -> Any:
            values = (value_of(name) for name in names)
            return next((value for value in values if value is not None), default)

        n_heads = first("num_attention_heads", "num_heads", default=1)
        d_model = config.hidden_size
        experts = first("num_local_experts", "num_experts")
        mlp, attention = architecture.mlp, architecture.attention
        return cls(
            model_name=name or str(getattr(config, "_name_or_path", "") or config.model_type),
            model_type=config.model_type,
            n_layers=config.num_hidden_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_key_value_heads=first("num_key_value_heads", default=n_heads),
            d_head=first("head_dim", default=d_model // n_heads),
            d_mlp=first("intermediate_size", "n_inner", "ffn_dim", default=4 * d_model if mlp else None),
            d_vocab=config.vocab_size,
            n_ctx=first("max_position_embeddings", "n_positions"),
            act_fn=first("hidden_activation", "hidden_act", "activation_function"),
            normalization_type="LN" if architecture.norm == "layer" else "RMS",
            positional_embedding_type=(
                "standard" if architecture.pos_embed else "rotary" if attention else "unknown"
            ),
            eps=first("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", default=1e-5),
            gated_mlp=mlp is not None and mlp.linear is not None,
            parallel_attn_mlp=architecture.is_parallel(config),
            num_experts=experts,
            experts_per_token=first("num_experts_per_tok") if experts else None,
            window_size=first("sliding_window", "window_size"),
            attn_scores_soft_cap=first("attn_logit_softcapping"),
            output_logits_soft_cap=first("final_logit_softcapping"),
            original=config,
        )

    @property
    def d_vocab_out(self) -> int:
        """Number of logits: the models here read and write the same tokens."""
        return self.d_vocab

    @property
    def attn_only(self) -> bool:
        """Whether layers have no MLP; False here. TransformerLens' own `ActivationCache` asks for it."""
        return False

    def switched_on(self) -> frozenset[str]:
        """Leaves of hooks for each head that functions of names select; only a model that is loaded has some."""
        return frozenset()

    def shape(self, point: Point, length: int) -> tuple[int, ...]:
        """Shape of a hook's value at one position, as stores keep it, in rows of ``length`` tokens."""
        sizes = {
            "d_model": self.d_model,
            "head": self.n_heads,
            "kv_head": self.n_key_value_heads,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp,
            "expert": self.num_experts,
            "expert_choice": self.experts_per_token,
            "one": 1,
            "source_position": length,
        }
        axis_sizes = tuple(sizes[axis] for axis in point.axes_in_store)
        assert all(axis_sizes), f"{point.leaf} has no size in this model"
        return tuple(size for size in axis_sizes if size)

"""Tiny configurations of every causal language model that transformers knows."""

from typing import Any, Final

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_TYPES: Final = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
N_LAYERS: Final = 3

_LAYERS: Final = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
)
_WIDTHS: Final = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size")
_HEADS: Final = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "global_num_key_value_heads"),
)
_INNER_WIDTHS: Final = (
    *(
        "intermediate_size",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "d_ff",
        "n_inner",
        "ffn_hidden_size",
    ),
    *("mamba_d_ssm",),
)
_EXPERTS: Final = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_EXPERT_WIDTHS: Final = (
    *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size",),
)
_SIZES: Final[dict[str, Any]] = {
    **dict.fromkeys(_LAYERS, N_LAYERS),
    **dict.fromkeys(_WIDTHS, 64),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_INNER_WIDTHS, 128),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_EXPERT_WIDTHS, 32),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 200),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("attention_hidden_size", "lru_width"), 64),
    # Multi-head latent attention.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    # State spaces and linear attention.
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("expand", "mamba_expand", "linear_num_key_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("time_step_rank", "conv_kernel", "linear_num_value_heads"), 4),
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
}
"""Sizes by field; a configuration gets those that it has."""
_OWN: Final[dict[str, dict[str, Any]]] = {
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "kimi_linear": {"num_experts_per_token": 2, "linear_num_heads": 2, "linear_head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"scale_emb": 2, "dim_model_base": 32},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "mamba_dt_rank": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layer_types": ["mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
        "n_mamba_heads": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Further fields that single types need."""


def tiny_config(model_type: str, *, without: str | None = None) -> Any:
    """A configuration of a type with three narrow layers.

    Args:
        model_type: ``config.model_type`` of Hugging Face.
        without: a field that keeps its default.

    Raises:
        Exception: whatever its class raises of sizes that do not go together.
    """
    known = AutoConfig.for_model(model_type).to_dict()
    fields = {name: size for name, size in _SIZES.items() if name in known and name != without}
    if known.get("layer_types"):
        fields["layer_types"] = None  # one a layer; the class makes them again
    return AutoConfig.for_model(model_type, **fields | _OWN.get(model_type, {}))

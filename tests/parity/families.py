"""The families with hooks, and settings of theirs under which hooks could go wrong."""

from typing import Any, Final

FAMILIES: Final = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)

_QWEN_WINDOW: Final = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

VARIANTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2-inverse-layer-scaling": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1}),
    "llama-all-key-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 24}),
    "qwen2_moe-one-dense-layer": ("qwen2_moe", {"mlp_only_layers": [1]}),
    # A window that is shorter than the rows of the tests.
    "gpt_neo-window": ("gpt_neo", {"window_size": 5}),
    "gemma2-window": ("gemma2", {"sliding_window": 5}),
    "gemma3_text-window": ("gemma3_text", {"sliding_window": 5}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mixtral-window": ("mixtral", {"sliding_window": 5}),
    "phi3-window": ("phi3", {"sliding_window": 5}),
    "qwen2-window": ("qwen2", _QWEN_WINDOW),
    "qwen3-window": ("qwen3", _QWEN_WINDOW),
}
"""Variants by name: (``config.model_type``, fields of the configuration besides the defaults of the tests)."""

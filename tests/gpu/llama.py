"""A model of the shape and size of Llama-3.2-1B with random weights: what a GPU needs to be kept busy."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

N_IDS = 32_000
BATCH = 16
CONTEXT = 1024


def config(**changes: Any) -> Any:
    """About 10^9 parameters in 16 layers."""
    fields: dict[str, Any] = {
        "vocab_size": N_IDS,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    return AutoConfig.for_model("llama", **fields | changes)


def build(device: str, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa", **changes: Any) -> Any:
    """The model on its device, made for inference."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config(**changes), dtype=dtype, attn_implementation=attention
        )
    return model.eval().requires_grad_(False)


def some_tokens(device: str, batch: int = BATCH, context: int = CONTEXT) -> Tensor:
    return torch.randint(0, N_IDS, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)

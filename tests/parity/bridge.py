"""TransformerLens' Bridge as an oracle: the values of its hooks, under the names of legacy TransformerLens."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_BLOCK: Final = (
    r"hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)"
    r"|attn\.hook_(q|k|v|z|rot_q|rot_k|attn_scores|pattern)"
    r"|mlp\.hook_(pre|pre_linear|post)"
    r"|ln[12]\.hook_(scale|normalized)"
)
_LEGACY: Final = re.compile(
    rf"hook_embed|hook_pos_embed|ln_final\.hook_(scale|normalized)|blocks\.\d+\.({_BLOCK})"
)
_GATE: Final = re.compile(r"(blocks\.\d+\.mlp)\.gate\.hook_out")

_AFTER_SOFTMAX: Final = {"attn.hook_attn_scores": "a second hook_pattern: attention is Hugging Face's own"}
_MIXTURE: Final = {
    "mlp.hook_pre": "what the mixture of experts is given, d_model wide",
    "mlp.hook_post": "what the mixture of experts gives, d_model wide",
}
MISNAMED: Final[Mapping[str, Mapping[str, str]]] = {
    "gpt_neo": _AFTER_SOFTMAX,
    "gptj": _AFTER_SOFTMAX,
    "opt": _AFTER_SOFTMAX,
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
}
"""Hooks of a block, by ``config.model_type``, whose value is not what the name says, with what it is instead.

``run`` returns them all the same. Layers of a mixture-of-experts model with a plain MLP are not meant.
"""


def boot(folder: Path) -> "TransformerBridge":
    """Load the model of a folder, which must have a tokenizer, too: float32, eager, with unchanged weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(str(folder), dtype=torch.float32, device="cpu")


def run(
    bridge: "TransformerBridge", tokens: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits, and the value of each hook that the Bridge has under a legacy name.

    The logits of a router of experts have no legacy name; they are ``blocks.{i}.mlp.gate.hook_out``, (b, s, experts).
    """
    given = {} if attention_mask is None else {"attention_mask": attention_mask}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        logits, cache = bridge.run_with_cache(tokens, return_cache_object=False, **given)
    values = {
        name: _by_position(value, tokens)
        for name, value in cache.items()
        if _LEGACY.fullmatch(name) or _is_router(name, cache)
    }
    return logits, values


def _is_router(name: str, cache: Mapping[str, torch.Tensor]) -> bool:
    """Whether a hook is a router of experts; the gate of a gated MLP has the same name."""
    match = _GATE.fullmatch(name)
    return match is not None and f"{match[1]}.hook_pre_linear" not in cache


def _by_position(value: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Reshape a value to (b, s, ...): norms before the MLP of OPT, and routers, give (b * s, ...)."""
    return value.reshape(*tokens.shape, -1) if value.ndim == 2 else value

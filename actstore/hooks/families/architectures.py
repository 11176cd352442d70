"""A table of model families: where each keeps its parts. Nothing else in actstore knows the inside of a model.

To add a family, add an entry with the paths of its modules in transformers 5: those of a layer relative to the layer,
all others relative to the base model (the one without a language-model head). Loading checks the entry against the
model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from actstore.hooks.naming.hook_points import POINTS

Norm = Literal["layer", "rms", "rms_plus_one"]
"""What a norm computes: LayerNorm, RMSNorm, or an RMSNorm that multiplies by 1 + weight."""


@dataclass(frozen=True)
class Attention:
    """The attention module of a layer."""

    module: str = "self_attn"
    """Path of the module, whose first output is the output of attention."""
    out: str = "o_proj"
    """Path of the output projection below the module; its input is z."""
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    fused: Literal["blocks", "heads"] | None = None
    """How one projection (``query``) gives queries, keys and values: in three blocks, or side by side for each head.
    None if there are three projections.
    """
    is_rotary: bool = True
    has_interface: bool = True
    """Whether the module calls transformers' AttentionInterface; otherwise it has a method ``_attn``."""
    is_scaled: bool = True
    """Whether scores of a module with ``_attn`` are divided by the root of d_head."""


@dataclass(frozen=True)
class Mlp:
    """The MLP of a layer; paths are relative to the layer."""

    module: str = "mlp"
    """Path of the module, whose output is the output of the MLP."""
    pre: str = "mlp.gate_proj"
    linear: str | None = "mlp.up_proj"
    """Path of the projection that a gated MLP multiplies by; None if the MLP is not gated."""
    out: str = "mlp.down_proj"
    is_fused: bool = False
    """Whether ``pre`` gives both projections of a gated MLP, one after the other."""
    router: str | None = None
    """Path of the module that chooses experts, if the MLP is a mixture. There are no neurons then, and ``pre`` and
    ``out`` mean nothing.
    """


_LLAMA_MLP: Final = Mlp()
_MIXTURE: Final = Mlp(router="mlp.gate")


@dataclass(frozen=True)
class Architecture:
    """One family of models."""

    prefix: str = "model"
    """Name of the base model in a model with a head."""
    layers: str = "layers"
    """Path of the list of layers."""
    embed: str = "embed_tokens"
    pos_embed: str | None = None
    ln_final: str | None = "norm"
    ln1: str | None = "input_layernorm"
    ln2: str | None = "post_attention_layernorm"
    """Path of the norm before the MLP; None where the MLP shares the norm before attention."""
    ln1_post: str | None = None
    ln2_post: str | None = None
    """Path of the norm after the MLP, before its output is added to the stream; ``ln1_post`` is that of attention."""
    norm: Norm = "rms"
    attention: Attention | None = Attention()
    mlp: Mlp | None = _LLAMA_MLP
    mlp_of: Callable[[Any, int], Mlp] | None = None
    """Gives the MLP of a layer from (config, layer), where layers differ."""
    is_parallel: Callable[[Any], bool] = lambda _config: False
    """Tells from the configuration whether attention and MLP both read the stream into the layer."""

    def mlp_at(self, config: Any, layer: int) -> Mlp | None:
        return self.mlp if self.mlp_of is None else self.mlp_of(config, layer)

    def undefined(self, config: Any, layer: int) -> Mapping[str, str]:
        """The hooks that a layer does not have, each with the reason."""
        reasons: dict[str, str] = {}
        if self.attention is None or self.mlp is None:
            return _GENERIC_UNDEFINED
        if self.is_parallel(config):
            reasons |= _PARALLEL
        if self.ln2 is None:
            reasons |= _SHARED_NORM
        if not self.attention.is_rotary:
            reasons |= _NOT_ROTARY
        mlp = self.mlp_at(config, layer)
        assert mlp is not None
        if mlp.router is not None:
            reasons |= _EXPERTS
        else:
            reasons |= _NO_EXPERTS
            if mlp.linear is None:
                reasons |= _NOT_GATED
        return reasons

    def undefined_outside(self) -> Mapping[str, str]:
        """The hooks outside of the layers that such a model does not have, each with the reason."""
        reasons = {}
        if self.pos_embed is None:
            reasons["hook_pos_embed"] = (
                "positions of this model are rotations inside of attention (attn.hook_rot_q, attn.hook_rot_k)"
                if self.attention is not None
                else "it is not known for this architecture"
            )
        if self.ln_final is None:
            reasons |= dict.fromkeys(("ln_final.hook_scale", "ln_final.hook_normalized"), _UNKNOWN)
        return reasons

    def aliases(self) -> Mapping[str, str]:
        """Our name of each leaf whose name in TransformerLens' Bridge depends on the family, by that name."""
        leaves = {}
        leaves["ln1_post.hook_out" if self.ln1_post else "attn.hook_out"] = "hook_attn_out"
        leaves["ln2_post.hook_out" if self.ln2_post else "mlp.hook_out"] = "hook_mlp_out"
        if self.mlp is not None and self.mlp.linear is not None:
            leaves |= {"mlp.gate.hook_out": "mlp.hook_pre", "mlp.in.hook_out": "mlp.hook_pre_linear"}
        else:
            leaves["mlp.in.hook_out"] = "mlp.hook_pre"
        return leaves


_UNKNOWN = "only the residual stream is known for this architecture"
_RESIDUAL = ("hook_resid_pre", "hook_resid_post")


_GENERIC_UNDEFINED: Final = {
    point.leaf: _UNKNOWN for point in POINTS if point.in_layer and point.leaf not in _RESIDUAL
}
_PARALLEL: Final = dict.fromkeys(
    ("hook_resid_mid", "hook_mlp_in"),
    "attention and MLP of this model run in parallel on hook_resid_pre, so there is no residual stream between them",
)
_SHARED_NORM: Final = {
    f"ln2.{leaf}": "attention and MLP of this model share one norm, ln1"
    for leaf in ("hook_scale", "hook_normalized", "hook_out")
}
_NOT_ROTARY: Final = {
    f"attn.hook_rot_{one}": f"attention of this model does not rotate; attn.hook_{one} is what it takes"
    for one in "qk"
}
_NOT_GATED: Final = {"mlp.hook_pre_linear": "the MLP of this model is not gated"}
_EXPERTS: Final = dict.fromkeys(
    ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"),
    "the MLP of this layer is a mixture of experts in one fused operation, which has no neurons of its own",
)
_NO_EXPERTS: Final = dict.fromkeys(
    ("mlp.hook_expert_weights", "mlp.hook_expert_indices"), "the MLP of this layer has no experts"
)


def _is_mixture_at(config: Any, layer: int) -> bool:
    """Whether a layer of a Qwen model is a mixture of experts."""
    return (
        layer not in (config.mlp_only_layers or ())
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
    )


def _qwen_mlp(config: Any, layer: int) -> Mlp:
    return _MIXTURE if _is_mixture_at(config, layer) else _LLAMA_MLP


def _always(_config: Any) -> bool:
    return True


_LLAMA: Final = Architecture()
_GPT2: Final = Architecture(
    prefix="transformer",
    layers="h",
    embed="wte",
    pos_embed="wpe",
    ln_final="ln_f",
    ln1="ln_1",
    ln2="ln_2",
    norm="layer",
    attention=Attention("attn", "c_proj", query="c_attn", fused="blocks", is_rotary=False),
    mlp=Mlp(pre="mlp.c_fc", linear=None, out="mlp.c_proj"),
)
_GPT_NEO: Final = replace(
    _GPT2,
    attention=Attention("attn.attention", "out_proj", is_rotary=False, has_interface=False, is_scaled=False),
)
_GPTJ: Final = replace(
    _GPT2,
    pos_embed=None,
    ln2=None,
    attention=Attention("attn", "out_proj", has_interface=False),
    mlp=Mlp(pre="mlp.fc_in", linear=None, out="mlp.fc_out"),
    is_parallel=_always,
)
_NEOX: Final = Architecture(
    prefix="gpt_neox",
    embed="embed_in",
    ln_final="final_layer_norm",
    norm="layer",
    attention=Attention("attention", "dense", query="query_key_value", fused="heads"),
    mlp=Mlp(pre="mlp.dense_h_to_4h", linear=None, out="mlp.dense_4h_to_h"),
    is_parallel=lambda config: bool(config.use_parallel_residual),
)
_PHI: Final = Architecture(
    ln_final="final_layernorm",
    ln2=None,
    norm="layer",
    attention=Attention(out="dense"),
    mlp=Mlp(pre="mlp.fc1", linear=None, out="mlp.fc2"),
    is_parallel=_always,
)
_PHI3: Final = Architecture(
    attention=Attention(query="qkv_proj", fused="blocks"),
    mlp=Mlp(pre="mlp.gate_up_proj", linear="mlp.gate_up_proj", is_fused=True),
)
_OPT: Final = Architecture(
    layers="decoder.layers",
    embed="decoder.embed_tokens",
    pos_embed="decoder.embed_positions",
    ln_final="decoder.final_layer_norm",
    ln1="self_attn_layer_norm",
    ln2="final_layer_norm",
    norm="layer",
    attention=Attention(out="out_proj", is_rotary=False),
    mlp=Mlp(module="fc2", pre="fc1", linear=None, out="fc2"),
)
_GEMMA: Final = Architecture(norm="rms_plus_one")
_GEMMA2: Final = replace(
    _GEMMA,
    ln2="pre_feedforward_layernorm",
    ln1_post="post_attention_layernorm",
    ln2_post="post_feedforward_layernorm",
)
_QWEN_MOE: Final = Architecture(mlp_of=_qwen_mlp)

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _NEOX,
    "gptj": _GPTJ,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Architecture(mlp=_MIXTURE),
    "opt": _OPT,
    "phi": _PHI,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen2_moe": _QWEN_MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _QWEN_MOE,
}


def base_of(model: Any) -> Any:
    """A model of transformers without its head; the model itself if it has none.

    ``base_model`` alone gives the whole model for the families whose ``base_model_prefix`` names no attribute of theirs
    (Llama 4).
    """
    if model.base_model is not model or model.get_output_embeddings() is None:
        return model.base_model
    from transformers import PreTrainedModel

    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)

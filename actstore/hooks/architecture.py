"""Where each hook's value appears in each family of Hugging Face models. One entry a family; nothing else in
actstore knows the inside of a model.

To add a family, name its list of layers (below the base model) and the place of each hook (below a layer). Module
paths are those of transformers 5.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from actstore.errors import ModelError


@dataclass(frozen=True)
class Site:
    """A value that passes a module of a layer."""

    module: str
    """Path below the layer; empty for the layer itself."""
    side: Literal["input", "output"]
    """The first positional argument, or the result (its first item, if it is a tuple)."""


def _nothing_undefined(_config: Any) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One family of models."""

    layers: str
    """Path of the list of layers, below the base model."""
    sites: Mapping[str, Site]
    """By hook, without its ``blocks.{i}.``; all of these have shape [d_model]."""
    undefined: Callable[[Any], Mapping[str, str]] = field(default=_nothing_undefined)
    """Hooks that a model of this configuration does not have, each with the reason."""

    def leaves(self, config: Any) -> tuple[str, ...]:
        """The hooks that every layer of such a model has."""
        undefined = self.undefined(config)
        return tuple(leaf for leaf in self.sites if leaf not in undefined)


def _neox_undefined(config: Any) -> Mapping[str, str]:
    if not config.use_parallel_residual:
        return {}
    return {
        "hook_resid_mid": "attention and MLP of this model run in parallel on hook_resid_pre, so there is no "
        "residual stream between them"
    }


def _pre_norm_block(*, attention: str, mlp: str, mid_norm: str) -> Mapping[str, Site]:
    """A block of attention then MLP, each behind its own norm: hooks in the order of the forward."""
    return {
        "hook_resid_pre": Site("", "input"),
        "hook_attn_out": Site(attention, "output"),
        "hook_resid_mid": Site(mid_norm, "input"),
        "hook_mlp_out": Site(mlp, "output"),
        "hook_resid_post": Site("", "output"),
    }


_GPT2: Final = Architecture("h", _pre_norm_block(attention="attn", mlp="mlp", mid_norm="ln_2"))
_LLAMA: Final = Architecture(
    "layers", _pre_norm_block(attention="self_attn", mlp="mlp", mid_norm="post_attention_layernorm")
)
_NEOX: Final = Architecture(
    "layers",
    _pre_norm_block(attention="attention", mlp="mlp", mid_norm="post_attention_layernorm"),
    undefined=_neox_undefined,
)

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": _NEOX,
}


def architecture(model_type: str) -> Architecture:
    """The family that a ``config.model_type`` belongs to.

    Raises:
        ModelError: it is not in the table.
    """
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise ModelError(
            f"models of type {model_type!r} cannot be hooked yet; supported types are "
            f"{', '.join(sorted(ARCHITECTURES))} (actstore/hooks/architecture.py says how to add one)"
        ) from None

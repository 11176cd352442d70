"""Sites: the places in the forward of a model where the values of hooks pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from actstore.hooks.families.architectures import Architecture, Attention, Mlp
from actstore.hooks.families.config import HookedConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """The part of a module's value [..., features] that a hook shows, and its shape. A part is a view, never a copy."""

    columns: tuple[int, int] | None = None
    """Columns ``(start, stop)`` of the features; None for all."""
    heads: int | None = None
    """Number of heads that the features are split into; None for no split."""
    of_three: int | None = None
    """Index into the three of features [head, 3, d_head]; None for features without three."""

    def view(self, value: "torch.Tensor") -> "torch.Tensor":
        """The part of a value; editing it in place edits the value."""
        if self.columns is not None:
            value = value[..., self.columns[0] : self.columns[1]]
        if self.of_three is not None:
            assert self.heads is not None
            return value.view(*value.shape[:-1], self.heads, 3, -1).select(-2, self.of_three)
        return value if self.heads is None else value.view(*value.shape[:-1], self.heads, -1)

    def put(self, value: "torch.Tensor", part: "torch.Tensor") -> "torch.Tensor":
        """A value with its part replaced; gradients flow through both."""
        if self.columns is None and self.of_three is None:
            return part.reshape(value.shape)
        copy = value.clone()
        self.view(copy).copy_(part)
        return copy


WHOLE = Part()


@dataclass(frozen=True)
class Site:
    """A value that passes a module."""

    module: str
    """Path below the layer, or below the base model for what is outside of layers; empty for the layer itself."""
    side: Literal["input", "output"]
    """``input`` is the first argument of the module; ``output`` its result, or the first item of a tuple."""
    part: Part = WHOLE
    in_place: bool = False
    """Whether a new value must be written into the old tensor, since other modules already hold that tensor."""
    is_apart: bool = False
    """Whether an edit must not reach the other modules that hold the same tensor."""


@dataclass(frozen=True)
class NormSite:
    """A value inside of a norm."""

    module: str
    what: Literal["scale", "normalized"]


@dataclass(frozen=True)
class AttentionSite:
    """A value inside of the attention function."""

    module: str
    what: Literal["rot_q", "rot_k", "scores", "pattern"]


@dataclass(frozen=True)
class ResultSite:
    """The output of the output projection, head by head."""

    module: str
    n_heads: int


@dataclass(frozen=True)
class RouterSite:
    """An output of the router of a mixture of experts."""

    module: str
    what: Literal["weights", "indices"]


@dataclass(frozen=True)
class HeadInputSite:
    """The stream before the norm of attention, a copy for each head, which goes into some of its projections."""

    norm: str
    n_heads: int
    projections: tuple[Site, ...]
    """Where the heads of queries, keys or values come out."""


AnySite = HeadInputSite | Site | NormSite | AttentionSite | ResultSite | RouterSite


def sites_in_layer(architecture: Architecture, cfg: HookedConfig, layer: int) -> Mapping[str, AnySite]:
    """The site of every leaf that a layer has, in the order of the forward."""
    sites: dict[str, AnySite] = {"hook_resid_pre": Site("", "input"), "hook_resid_post": Site("", "output")}
    if architecture.ln1 is not None:
        sites |= _norm("ln1", architecture.ln1)
    if architecture.ln2 is not None:
        sites |= _norm("ln2", architecture.ln2)
        sites["hook_resid_mid"] = Site(architecture.ln2, "input", in_place=True)
        sites["hook_mlp_in"] = Site(architecture.ln2, "input", is_apart=True)
    mlp = architecture.mlp_at(cfg.original, layer)
    if architecture.attention is not None:
        sites |= _attention(architecture.attention, cfg)
        if architecture.ln1 is not None:
            sites |= _head_inputs(architecture.ln1, sites, cfg)
        sites["hook_attn_out"] = Site(architecture.ln1_post or architecture.attention.module, "output")
    if mlp is not None:
        sites |= _mlp(mlp, cfg)
        sites["hook_mlp_out"] = Site(architecture.ln2_post or mlp.module, "output")
    undefined = architecture.undefined(cfg.original, layer)
    return {leaf: site for leaf, site in sites.items() if leaf not in undefined}


def sites_outside(architecture: Architecture) -> Mapping[str, AnySite]:
    """The site of every hook outside of layers."""
    sites: dict[str, AnySite] = {"hook_embed": Site(architecture.embed, "output")}
    if architecture.pos_embed is not None:
        sites["hook_pos_embed"] = Site(architecture.pos_embed, "output")
    if architecture.ln_final is not None:
        sites["ln_final.hook_scale"] = NormSite(architecture.ln_final, "scale")
        sites["ln_final.hook_normalized"] = NormSite(architecture.ln_final, "normalized")
    return sites


def _norm(name: str, module: str) -> dict[str, AnySite]:
    return {
        f"{name}.hook_scale": NormSite(module, "scale"),
        f"{name}.hook_normalized": NormSite(module, "normalized"),
        f"{name}.hook_out": Site(module, "output"),
    }


def _attention(attention: Attention, cfg: HookedConfig) -> dict[str, AnySite]:
    def below(name: str) -> str:
        return f"{attention.module}.{name}"

    heads, kv_heads = cfg.n_heads, cfg.n_key_value_heads
    fused = below(attention.query)
    if attention.fused == "heads":
        parts = [Site(fused, "output", Part(heads=heads, of_three=which)) for which in range(3)]
    elif attention.fused == "blocks":
        ends = [heads * cfg.d_head, (heads + kv_heads) * cfg.d_head, (heads + 2 * kv_heads) * cfg.d_head]
        parts = [
            Site(fused, "output", Part((start, stop), n))
            for start, stop, n in zip([0, *ends], ends, (heads, kv_heads, kv_heads), strict=False)
        ]
    else:
        names = (attention.query, attention.key, attention.value)
        parts = [
            Site(below(name), "output", Part(heads=n))
            for name, n in zip(names, (heads, kv_heads, kv_heads), strict=True)
        ]
    return {
        "attn.hook_q": parts[0],
        "attn.hook_k": parts[1],
        "attn.hook_v": parts[2],
        "attn.hook_rot_q": AttentionSite(attention.module, "rot_q"),
        "attn.hook_rot_k": AttentionSite(attention.module, "rot_k"),
        "attn.hook_attn_scores": AttentionSite(attention.module, "scores"),
        "attn.hook_pattern": AttentionSite(attention.module, "pattern"),
        "attn.hook_z": Site(below(attention.out), "input", Part(heads=heads)),
        "attn.hook_result": ResultSite(below(attention.out), heads),
    }


def _head_inputs(norm: str, sites: Mapping[str, AnySite], cfg: HookedConfig) -> dict[str, AnySite]:
    def fed(*names: str) -> tuple[Site, ...]:
        projections = [sites[f"attn.hook_{name}"] for name in names]
        return tuple(site for site in projections if isinstance(site, Site))

    heads, kv_heads = cfg.n_heads, cfg.n_key_value_heads
    inputs: dict[str, AnySite] = {
        "hook_q_input": HeadInputSite(norm, heads, fed("q")),
        "hook_k_input": HeadInputSite(norm, kv_heads, fed("k")),
        "hook_v_input": HeadInputSite(norm, kv_heads, fed("v")),
    }
    if heads == kv_heads:
        inputs["hook_attn_in"] = HeadInputSite(norm, heads, fed("q", "k", "v"))
    return inputs


def _mlp(mlp: Mlp, cfg: HookedConfig) -> dict[str, AnySite]:
    if mlp.router is not None:
        return {
            "mlp.hook_expert_weights": RouterSite(mlp.router, "weights"),
            "mlp.hook_expert_indices": RouterSite(mlp.router, "indices"),
        }
    sites: dict[str, AnySite] = {"mlp.hook_post": Site(mlp.out, "input")}
    if mlp.is_fused:
        assert cfg.d_mlp is not None
        sites["mlp.hook_pre"] = Site(mlp.pre, "output", Part((0, cfg.d_mlp)))
        sites["mlp.hook_pre_linear"] = Site(mlp.pre, "output", Part((cfg.d_mlp, 2 * cfg.d_mlp)))
    else:
        sites["mlp.hook_pre"] = Site(mlp.pre, "output")
        if mlp.linear is not None:
            sites["mlp.hook_pre_linear"] = Site(mlp.linear, "output")
    return sites

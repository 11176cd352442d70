"""RelP: rules that put coefficients of relevance in the place of gradients (https://arxiv.org/abs/2508.21258).

A gradient says what an infinitely small step does. A clean value lies further away, where norms, patterns and
activation functions have other slopes. So the rules treat these as what they are at the corrupted run: a norm divides
by a constant (LN-rule), a pattern is constant (AH-rule), an activation function multiplies by a constant
(identity rule), and the factors of a gated neuron have half of its relevance each (half rule).

Functions on hooks do it, in a run with a graph. They change what flows back, and no value.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import HookError, ModelError
from actstore.hooks.capture.hook_point import HookFunction, HookPoint
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.hooks.weights.norms import eps_of, norm_weights, normalize

if TYPE_CHECKING:
    import torch

    from actstore.hooks.families.architectures import Norm

Functions = Iterator[tuple[str, HookFunction]]
"""Pairs of (name of a hook, function)."""

_CONSTANT: Final = (
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "ln1.hook_scale",
    "ln2.hook_scale",
)
"""Leaves that reach the logits only through what a rule holds constant."""
_TOLERANCE: Final = {"torch.float32": 1e-4, "torch.float64": 1e-9}
_TOLERANCE_OF_HALVES: Final = 0.05
"""How far neurons may lie from what the activation function of the configuration gives, as a share of the largest."""


def relevance_rules(model: HookedModel, leaves: Mapping[str, str]) -> list[tuple[str, HookFunction]]:
    """The functions on hooks for all rules, for one forward with a graph.

    Args:
        model: the model.
        leaves: leaves whose coefficients are asked for, each with the name that the user gave.

    Raises:
        ModelError: a rule is missing for a part of the model.
        HookError: a hook has no coefficient by these rules.
    """
    if model.has_functions:
        raise ModelError(
            "there are functions on hooks of this model, which the rules of RelP know nothing of; remove them, or use "
            "method='atp'"
        )
    for leaf, hook in leaves.items():
        if leaf in _CONSTANT:
            raise HookError(
                f"RelP holds patterns and the scales of norms constant, so {hook} has no coefficient; use method='atp'"
            )
        if leaf == "attn.hook_result" and model.architecture.ln1_post is not None:
            raise HookError(
                f"RelP has no coefficient of {hook} where a norm follows attention; choose 'z', or method='atp'"
            )
    functions: list[tuple[str, HookFunction]] = []
    for layer in (None, *range(model.cfg.n_layers)):
        for kind in _kinds(model, layer):
            functions += RULES[kind](model, layer)
    return functions


def _kinds(model: HookedModel, layer: int | None) -> Iterator[str]:
    """The kinds of the parts of a layer, or of those outside of layers for None, as `RULES` names them."""
    family = model.architecture
    if family.attention is None or family.mlp is None:
        yield "unknown family"
        return
    yield f"{family.norm} norm"
    if layer is None:
        return
    yield "attention"
    mlp = family.mlp_at(model.cfg.original, layer)
    assert mlp is not None
    yield "mixture of experts" if mlp.router else "gated mlp" if mlp.linear else "mlp"
    if family.ln1_post is not None:
        yield "norm behind attention"
    if family.ln2_post is not None:
        yield "norm behind mlp"


def _norms(model: HookedModel, layer: int | None) -> Functions:
    """LN-rule: what a norm divides by is constant."""
    names = [join(layer, f"{norm}.hook_scale") for norm in ("ln1", "ln2", "ln_final")]
    yield from ((name, _constant) for name in names if name in model.names)


def _patterns(model: HookedModel, layer: int | None) -> Functions:
    """AH-rule: the pattern is constant, so that relevance flows through values alone."""
    del model
    yield join(layer, "attn.hook_pattern"), _constant


def _neurons(model: HookedModel, layer: int | None) -> Functions:
    """Identity rule: an activation function multiplies by the constant act(pre) / pre."""
    neurons = _Neurons(model, is_gated=False)
    yield join(layer, "mlp.hook_pre"), neurons.keep_pre
    yield join(layer, "mlp.hook_post"), neurons.replace


def _gated_neurons(model: HookedModel, layer: int | None) -> Functions:
    """Identity rule for the gate, and half rule for the product: each factor has half of the relevance."""
    neurons = _Neurons(model, is_gated=True)
    yield join(layer, "mlp.hook_pre"), neurons.keep_pre
    yield join(layer, "mlp.hook_pre_linear"), neurons.keep_linear
    yield join(layer, "mlp.hook_post"), neurons.replace


def _norm_behind_attention(model: HookedModel, layer: int | None) -> Functions:
    """LN-rule for a norm that has no hooks: its output is computed again from the input of the output projection."""
    family = model.architecture
    assert family.attention is not None
    assert family.ln1_post is not None
    assert layer is not None
    behind = _NormBehind(model, layer, f"{family.attention.module}.{family.attention.out}", family.ln1_post)
    yield join(layer, "attn.hook_z"), behind.keep
    yield join(layer, "hook_attn_out"), behind.replace


def _norm_behind_mlp(model: HookedModel, layer: int | None) -> Functions:
    """As `_norm_behind_attention`, from neurons."""
    family = model.architecture
    assert layer is not None
    mlp = family.mlp_at(model.cfg.original, layer)
    assert mlp is not None
    assert family.ln2_post is not None
    behind = _NormBehind(model, layer, mlp.out, family.ln2_post)
    yield join(layer, "mlp.hook_post"), behind.keep
    yield join(layer, "hook_mlp_out"), behind.replace


def _no_rule(model: HookedModel, layer: int | None) -> Functions:
    """Refuse what has no rule."""
    what = (
        f"layer {layer}, whose MLP is a mixture of experts"
        if layer is not None
        else f"a {model.cfg.model_type} model, of which only the residual stream is known"
    )
    raise ModelError(f"RelP has no rule for {what}; use method='atp'")


RULES: Final[Mapping[str, Callable[[HookedModel, int | None], Functions]]] = {
    "layer norm": _norms,
    "rms norm": _norms,
    "rms_plus_one norm": _norms,
    "norm behind attention": _norm_behind_attention,
    "norm behind mlp": _norm_behind_mlp,
    "attention": _patterns,
    "mlp": _neurons,
    "gated mlp": _gated_neurons,
    "mixture of experts": _no_rule,
    "unknown family": _no_rule,
}
"""The rule for each kind of part that the table of families knows. Whatever else a model has keeps its gradient: linear
maps, whose gradient is their coefficient, and a softcap of logits.
"""


def _constant(value: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor":
    """Let nothing flow back through a value."""
    del hook
    return value.detach()


def _with_gradient_of(value: "torch.Tensor", linear: "torch.Tensor") -> "torch.Tensor":
    """A value, bit for bit, whose gradient is that of another tensor of its shape."""
    return value.detach() + (linear - linear.detach())


class _Neurons:
    """The activation function of one layer as a multiplication by constants."""

    def __init__(self, model: HookedModel, *, is_gated: bool) -> None:
        self._act = _activation(model)
        self._tolerance = _TOLERANCE.get(str(model.dtype), _TOLERANCE_OF_HALVES)
        self._is_gated = is_gated
        self._pre: Any = None
        self._linear: Any = None

    def keep_pre(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        del hook
        self._pre = value

    def keep_linear(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        del hook
        self._linear = value

    def replace(self, value: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor":
        pre = self._pre
        act, ratio = ratio_of(self._act, pre.detach())
        if self._is_gated:
            linear = self._linear
            expected = act * linear.detach()
            relevance = (pre * (ratio * linear.detach()) + linear * act) / 2
        else:
            expected = act
            relevance = pre * ratio
        self._pre = self._linear = None
        difference = (expected - value.detach()).abs().max()
        if not difference <= self._tolerance * expected.abs().max():
            raise ModelError(
                f"{hook.name} is not what the activation function of the configuration gives, so RelP has no rule for "
                "it; use method='atp'"
            )
        return _with_gradient_of(value, relevance)


def ratio_of(
    act: "Callable[[torch.Tensor], torch.Tensor]", pre: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """(act(pre), act(pre) / pre), where the ratio at 0 is its limit, the slope of the function there."""
    import torch

    with torch.enable_grad():
        zero = torch.zeros(1, dtype=pre.dtype, device=pre.device, requires_grad=True)
        (slope,) = torch.autograd.grad(act(zero).sum(), zero)
    with torch.no_grad():
        value = act(pre)
        # A quotient of subnormal numbers has few bits; the function is linear there.
        is_small = pre.abs() < torch.finfo(pre.dtype).tiny
        ratio = torch.where(is_small, slope, value / torch.where(is_small, 1.0, pre))
    return value, ratio


def _activation(model: HookedModel) -> "Callable[[torch.Tensor], torch.Tensor]":
    """The activation function of a model.

    Raises:
        ModelError: it is not known, or not 0 at 0, so that it is no multiple of its input.
    """
    import torch
    from transformers.activations import ACT2FN

    name = model.cfg.act_fn
    act: Any = ACT2FN[name] if name in ACT2FN else None  # noqa: SIM401 - get would give a class
    if act is None or float(act(torch.zeros(1)).detach().abs()) > 0:
        raise ModelError(f"RelP has no rule for the activation function {name}; use method='atp'")

    def applied(value: "torch.Tensor") -> "torch.Tensor":
        result: torch.Tensor = act(value)
        return result

    return applied


class _NormBehind:
    """A norm behind the projection that ends attention or an MLP, as a division by a constant."""

    def __init__(self, model: HookedModel, layer: int, projection: str, norm: str) -> None:
        module = model.layers[layer]
        self._projection = module.get_submodule(projection)
        self._norm = module.get_submodule(norm)
        self._kind: Norm = model.architecture.norm
        self._input: Any = None

    def keep(self, value: "torch.Tensor", /, *, hook: HookPoint) -> None:
        del hook
        self._input = value

    def replace(self, value: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor":
        del hook
        written = self._projection(self._input.reshape(*self._input.shape[:2], -1))
        self._input = None
        scale, _ = normalize(written.detach(), eps_of(self._norm), norm=self._kind)
        weights = norm_weights(self._norm, self._kind)
        centred = written.float()
        if self._kind == "layer":
            centred = centred - centred.mean(-1, keepdim=True)
        linear = centred / scale * weights.w.detach().float() + weights.b.detach().float()
        return _with_gradient_of(value, linear.to(value.dtype))

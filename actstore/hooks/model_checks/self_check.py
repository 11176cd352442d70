"""A check that the hooks of a loaded model give the values that their names promise, on one short row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.families.generic import cannot_hook
from actstore.hooks.loaded_model import LoadedModel
from actstore.hooks.model_checks.self_check_weights import (
    READ,
    READ_OUTSIDE,
    Identity,
    identities_in_layer,
    identities_outside,
)
from actstore.hooks.naming.names import join
from actstore.reason import reason

if TYPE_CHECKING:
    import torch


_LENGTH = 8
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest error by dtype, relative to the largest value. A wrong hook is off by about 1."""
_LEAVES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
_ATTENTION_LEAVES = ("attn.hook_v", "attn.hook_pattern", "attn.hook_z")

Values = dict[str, "torch.Tensor"]


def self_check(model: LoadedModel) -> None:
    """Compare hook values and weights of every layer by identities that hold in any transformer.

    Raises:
        ModelError: an identity does not hold; the message says which, in which layer, and how far it is off.
    """
    import torch

    # Tokens far apart, so that nothing agrees by accident.
    tokens = (torch.arange(_LENGTH, device=model.device) * 7919 % model.cfg.d_vocab)[None]
    row = _row(model, tokens)
    with torch.no_grad():
        _check(model, tokens, row)


@dataclass(frozen=True)
class _Row:
    """The values of one forward."""

    values: Values
    """Values of hooks by name."""
    outputs: Mapping[tuple[int, str], "torch.Tensor"]
    """Outputs [1, position, d_model] by (layer, module): ``attention`` and ``mlp`` before any norm after them, and
    ``ln_final`` under layer -1.
    """


def _check(model: LoadedModel, tokens: "torch.Tensor", row: _Row) -> None:
    for layer in range(model.cfg.n_layers):
        by_leaf = {
            name.split(".", 2)[-1]: value
            for name, value in row.values.items()
            if name.startswith(f"blocks.{layer}.")
        }
        if layer > 0:
            by_leaf["before"] = row.values[join(layer - 1, "hook_resid_post")]
        for what, left, right in _identities(model, layer, by_leaf):
            _compare(model, f"in layer {layer} {what}", left, right)
        if model.architecture.attention is not None:
            outputs = {what: value for (index, what), value in row.outputs.items() if index == layer}
            for what, left, right in identities_in_layer(model, layer, by_leaf, outputs):
                _compare(model, f"in layer {layer} {what}", left, right)
    for what, left, right in identities_outside(model, tokens, row.values, row.outputs.get((-1, "ln_final"))):
        _compare(model, what, left, right)
    if model.architecture.attention is None:
        _check_causal(model, tokens, row.values)


def _row(model: LoadedModel, tokens: "torch.Tensor") -> _Row:
    layers = range(model.cfg.n_layers)
    leaves = (*_LEAVES, *_ATTENTION_LEAVES, *READ)
    names = [*READ_OUTSIDE, *(join(layer, leaf) for layer in layers for leaf in leaves)]
    wanted = [name for name in names if name in model.names]
    values: Values = {}
    outputs: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            # Some modules see rows and positions as one axis.
            outputs[key] = value.clone().view(*tokens.shape, -1)

        return hook

    handles = []
    try:
        for key, module in _modules(model):
            handles.append(module.register_forward_hook(keep(key)))
        model.run(tokens, wanted, lambda name, value: values.update({name: value.clone()}))
    except ModelError:
        raise
    except (TypeError, AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
        kind = f"{type(error).__name__} " if isinstance(error, LookupError) else ""
        raise ModelError(
            f"this {model.cfg.model_type} model cannot be hooked: capturing its values failed with {kind}"
            f"{reason(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _Row(values, outputs)


def _modules(model: LoadedModel) -> Iterator[tuple[tuple[int, str], Any]]:
    """Modules whose outputs no hook shows unchanged, by (layer, name); the layer is -1 outside of layers."""
    architecture = model.architecture
    if architecture.attention is None:
        return
    for layer in range(model.cfg.n_layers):
        yield (layer, "attention"), model.layers[layer].get_submodule(architecture.attention.module)
        mlp = architecture.mlp_at(model.cfg.original, layer)
        if mlp is not None:
            yield (layer, "mlp"), model.layers[layer].get_submodule(mlp.module)
    if architecture.ln_final is not None and "ln_final.hook_normalized" in model.names:
        yield (-1, "ln_final"), model.base.get_submodule(architecture.ln_final)


def _identities(model: LoadedModel, layer: int, by_leaf: Values) -> Iterator[Identity]:
    shape = (1, _LENGTH, model.cfg.d_model)
    pre, post = by_leaf["hook_resid_pre"], by_leaf["hook_resid_post"]
    if pre.shape != shape or post.shape != shape:
        raise cannot_hook(
            model.cfg.model_type, f"layer {layer} gives {tuple(post.shape)}, expected was {shape}"
        )
    if "before" in by_leaf:
        yield "hook_resid_post of the layer before == hook_resid_pre", by_leaf["before"], pre
    attention = model.architecture.attention
    if attention is None:
        return
    attn_out, mlp_out = by_leaf["hook_attn_out"], by_leaf["hook_mlp_out"]
    if "hook_resid_mid" in by_leaf:
        yield "hook_resid_pre + hook_attn_out == hook_resid_mid", pre + attn_out, by_leaf["hook_resid_mid"]
        yield "hook_resid_mid + hook_mlp_out == hook_resid_post", by_leaf["hook_resid_mid"] + mlp_out, post
    else:
        yield (
            "hook_resid_pre + hook_attn_out + hook_mlp_out == hook_resid_post",
            pre + attn_out + mlp_out,
            post,
        )
    z, v, pattern = (by_leaf[leaf] for leaf in ("attn.hook_z", "attn.hook_v", "attn.hook_pattern"))
    sums = pattern.float().sum(-1)
    yield "rows of attn.hook_pattern sum to 1", sums, sums.new_ones(sums.shape)
    repeated = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2).transpose(1, 2)
    yield "attn.hook_pattern @ attn.hook_v == attn.hook_z", (pattern @ repeated).transpose(1, 2), z


def _compare(model: LoadedModel, what: str, left: "torch.Tensor", right: "torch.Tensor") -> None:
    dtype = _dtype(model)
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE["float32"])
    left = left.to(right.device)
    error = float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))
    if not error <= tolerance:  # also when it is not a number
        raise ModelError(
            f"this {model.cfg.model_type} model cannot be hooked: {what} is off by {error:.2g} of "
            f"its largest value, allowed is {tolerance:.0e}; its modules are not where actstore expects them, "
            f"something else changes what they give, or it cannot be computed in {dtype}"
        )


def _dtype(model: LoadedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _check_causal(model: LoadedModel, tokens: "torch.Tensor", values: Values) -> None:
    """Refuse a model whose positions see later ones: values would depend on how rows are padded or cut.

    Raises:
        ModelError: they do.
    """
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.cfg.d_vocab
    last = join(model.cfg.n_layers - 1, "hook_resid_post")
    again: Values = {}
    model.run(changed, [last], lambda name, value: again.update({name: value.clone()}))
    before, after = values[last][:, :-1], again[last][:, :-1]
    if not (before - after).abs().max() <= _TOLERANCE.get(_dtype(model), 1e-4) * before.abs().max():
        raise cannot_hook(model.cfg.model_type, "its positions see later ones")

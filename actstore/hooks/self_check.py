"""A check that the hooks of a loaded model are what their names say, on one short row."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.generic import cannot_hook
from actstore.hooks.names import join
from actstore.hooks.taps import projection

if TYPE_CHECKING:
    import torch

    from actstore.hooks.model import HookedModel

_LENGTH = 8
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Relative to the largest value; a wrong hook is wrong by about 1."""
_LEAVES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
_ATTENTION_LEAVES = ("attn.hook_v", "attn.hook_pattern", "attn.hook_z")

Values = dict[str, "torch.Tensor"]


def self_check(model: "HookedModel") -> None:
    """Compare hook values of every layer by identities that hold in any transformer.

    Raises:
        ModelError: one does not hold; the message says which, in which layer, and by how much.
    """
    import torch

    # Tokens far apart, so that nothing agrees by accident.
    tokens = (torch.arange(_LENGTH, device=model.device) * 7919 % model.cfg.d_vocab)[None]
    values, attention_out = _values(model, tokens)
    with torch.no_grad():
        _check(model, tokens, values, attention_out)


def _check(
    model: "HookedModel", tokens: "torch.Tensor", values: Values, attention_out: list["torch.Tensor"]
) -> None:
    for layer in range(model.cfg.n_layers):
        found = {
            name.split(".", 2)[-1]: value
            for name, value in values.items()
            if name.startswith(f"blocks.{layer}.")
        }
        if layer > 0:
            found["before"] = values[join(layer - 1, "hook_resid_post")]
        for what, left, right in _identities(model, layer, found, attention_out):
            _compare(model, layer, what, left, right)
    if model.architecture.attention is None:
        _check_causal(model, tokens, values)


def _values(model: "HookedModel", tokens: "torch.Tensor") -> tuple[Values, list["torch.Tensor"]]:
    """Hook values, and what the attention module of each layer gives before any norm behind it."""
    leaves = (*_LEAVES, *_ATTENTION_LEAVES)
    wanted = [
        name
        for layer in range(model.cfg.n_layers)
        for leaf in leaves
        if (name := join(layer, leaf)) in model.names
    ]
    values: Values = {}
    outputs: list[torch.Tensor] = []
    handles = []
    attention = model.architecture.attention
    try:
        if attention is not None:
            handles = [
                layer.get_submodule(attention.module).register_forward_hook(
                    lambda _module, _args, output: outputs.append(output[0].clone())
                )
                for layer in model.layers
            ]
        model.run(tokens, wanted, lambda name, value: values.update({name: value.clone()}))
    except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"this {model.cfg.model_type} model cannot be hooked: capturing its values failed with {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return values, outputs


def _identities(
    model: "HookedModel", layer: int, found: Values, attention_out: list["torch.Tensor"]
) -> Iterator[tuple[str, "torch.Tensor", "torch.Tensor"]]:
    """(the identity in words, left side, right side)"""
    shape = (1, _LENGTH, model.cfg.d_model)
    pre, post = found["hook_resid_pre"], found["hook_resid_post"]
    if pre.shape != shape or post.shape != shape:
        raise cannot_hook(
            model.cfg.model_type, f"layer {layer} gives {tuple(post.shape)}, expected was {shape}"
        )
    if "before" in found:
        yield "hook_resid_post of the layer before == hook_resid_pre", found["before"], pre
    attention = model.architecture.attention
    if attention is None:
        return
    attn_out, mlp_out = found["hook_attn_out"], found["hook_mlp_out"]
    if "hook_resid_mid" in found:
        yield "hook_resid_pre + hook_attn_out == hook_resid_mid", pre + attn_out, found["hook_resid_mid"]
        yield "hook_resid_mid + hook_mlp_out == hook_resid_post", found["hook_resid_mid"] + mlp_out, post
    else:
        yield (
            "hook_resid_pre + hook_attn_out + hook_mlp_out == hook_resid_post",
            pre + attn_out + mlp_out,
            post,
        )
    z, v, pattern = (found[leaf] for leaf in ("attn.hook_z", "attn.hook_v", "attn.hook_pattern"))
    out: Any = model.layers[layer].get_submodule(f"{attention.module}.{attention.out}")
    given = z.flatten(-2) @ projection(out)
    yield (
        "attn.hook_z @ W_O + b_O == output of attention",
        given if out.bias is None else given + out.bias,
        attention_out[layer],
    )
    sums = pattern.float().sum(-1)
    yield "rows of attn.hook_pattern sum to 1", sums, sums.new_ones(sums.shape)
    repeated = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2).transpose(1, 2)
    yield "attn.hook_pattern @ attn.hook_v == attn.hook_z", (pattern @ repeated).transpose(1, 2), z


def _compare(
    model: "HookedModel", layer: int, what: str, left: "torch.Tensor", right: "torch.Tensor"
) -> None:
    dtype = _dtype(model)
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE["float32"])
    error = float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))
    if not error <= tolerance:  # also when it is not a number
        raise ModelError(
            f"this {model.cfg.model_type} model cannot be hooked: in layer {layer} {what} is off by {error:.2g} of "
            f"its largest value, allowed is {tolerance:.0e}; its modules are not where actstore expects them, or it "
            f"cannot be computed in {dtype}"
        )


def _dtype(model: "HookedModel") -> str:
    return str(model.dtype).removeprefix("torch.")


def _check_causal(model: "HookedModel", tokens: "torch.Tensor", values: Values) -> None:
    """Positions must not see later ones, or rows that are padded or cut would mean something else."""
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.cfg.d_vocab
    last = join(model.cfg.n_layers - 1, "hook_resid_post")
    again: Values = {}
    model.run(changed, [last], lambda name, value: again.update({name: value.clone()}))
    before, after = values[last][:, :-1], again[last][:, :-1]
    if not (before - after).abs().max() <= _TOLERANCE.get(_dtype(model), 1e-4) * before.abs().max():
        raise cannot_hook(model.cfg.model_type, "its positions see later ones")

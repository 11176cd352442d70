"""A check that the weights that a model shows are those that it computes with, on the values of one short row."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from actstore.errors import ModelError
from actstore.hooks.loaded_model import LoadedModel

if TYPE_CHECKING:
    import torch

    from actstore.hooks.weights.block_weights import BlockWeights
    from actstore.hooks.weights.norms import NormWeights

Values = Mapping[str, "torch.Tensor"]
Identity = tuple[str, "torch.Tensor", "torch.Tensor"]
"""An identity: (its text, left side, right side)."""
READ = (
    *("ln1.hook_normalized", "ln1.hook_out", "ln2.hook_normalized", "ln2.hook_out"),
    *("attn.hook_q", "attn.hook_k", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"),
)
"""Leaves whose values this check needs besides those of `self_check`."""
READ_OUTSIDE = ("hook_embed", "hook_pos_embed", "ln_final.hook_normalized")


def identities_in_layer(
    model: LoadedModel, layer: int, values: Values, outputs: Mapping[str, "torch.Tensor"]
) -> Iterator[Identity]:
    """Identities that hold for the weights of a layer. Those with a weight that the model refuses to show are left out.

    Args:
        model: a model of a family that is known.
        layer: its number.
        values: values of the layer's hooks by leaf, [1, position, ...].
        outputs: outputs of the modules ``attention`` and ``mlp``, before any norm after them.
    """
    block = model.weights.blocks[layer]
    architecture = model.architecture
    for norm in ("ln1", "ln2"):
        if f"{norm}.hook_out" in values:
            yield from _norm(block, norm, values[f"{norm}.hook_normalized"], values[f"{norm}.hook_out"])
    for norm, path, before, after in (
        ("ln1_post", architecture.ln1_post, "attention", "hook_attn_out"),
        ("ln2_post", architecture.ln2_post, "mlp", "hook_mlp_out"),
    ):
        if path is not None:
            eps = model.cfg.eps
            yield from _norm(block, norm, _root_mean_square(outputs[before], eps), values[after])
    assert architecture.attention is not None
    out = model.layers[layer].get_submodule(f"{architecture.attention.module}.{architecture.attention.out}")
    yield from _attention(block, values, outputs["attention"], out)
    if not block.mlp.is_mixture:
        yield from _mlp(block, values, outputs["mlp"])


def identities_outside(
    model: LoadedModel, tokens: "torch.Tensor", values: Values, head: "torch.Tensor | None"
) -> Iterator[Identity]:
    """Identities that hold for the weights of embeddings, the final norm, and the head.

    Args:
        model: the model.
        tokens: ids [1, position].
        values: values of hooks outside of layers by name.
        head: output of the final norm [1, position, d_model], where it is known.
    """
    weights = model.weights
    embedded = values["hook_embed"]
    yield from _seen("W_E[tokens] == hook_embed", lambda: weights.W_E[tokens], embedded)
    if "hook_pos_embed" in values:
        positions = values["hook_pos_embed"]
        yield from _seen(
            "W_pos[positions] == hook_pos_embed", lambda: weights.W_pos[: tokens.shape[1]][None], positions
        )
    if head is None:
        return
    normalized = values["ln_final.hook_normalized"]
    yield from _seen(
        "ln_final.hook_normalized * ln_final.w + ln_final.b == output of ln_final",
        lambda: _scaled(normalized, weights.ln_final),
        head,
    )
    if model.has_head:
        # One position: a large vocabulary would otherwise cost as much as layers do.
        last = head[:, -1]
        unembed: Any = model.hf.get_output_embeddings()
        yield from _seen(
            "output of ln_final @ W_U + b_U == output of the head",
            lambda: last @ weights.W_U + weights.b_U,
            unembed(last),
        )


def _attention(block: "BlockWeights", values: Values, output: "torch.Tensor", out: Any) -> Iterator[Identity]:
    import torch

    read, n_heads = values["ln1.hook_out"], values["attn.hook_z"].shape[2]
    for one in "QKV":
        made = values[f"attn.hook_{one.lower()}"]
        made = made.repeat_interleave(n_heads // made.shape[2], dim=2)

        def projected(one: str = one) -> "torch.Tensor":
            weight, bias = getattr(block.attn, f"W_{one}"), getattr(block.attn, f"b_{one}")
            made: torch.Tensor = torch.einsum("bpd,hdk->bphk", read, weight) + bias
            return made

        yield from _seen(f"ln1.hook_out @ W_{one} + b_{one} == attn.hook_{one.lower()}", projected, made)
    z = values["attn.hook_z"]
    of_weight = list(
        _seen(
            "attn.hook_z @ W_O + b_O == output of attention",
            lambda: z.flatten(-2) @ block.attn.W_O.flatten(0, 1) + block.attn.b_O,
            output,
        )
    )
    # Without W_O, z can still be checked by the module that it goes into.
    yield from of_weight or [
        ("output projection of attn.hook_z == output of attention", out(z.flatten(-2)), output)
    ]


def _mlp(block: "BlockWeights", values: Values, output: "torch.Tensor") -> Iterator[Identity]:
    mlp = block.mlp
    read = values["ln2.hook_out" if "ln2.hook_out" in values else "ln1.hook_out"]
    norm = "ln2" if "ln2.hook_out" in values else "ln1"
    pre = values["mlp.hook_pre"]
    if "mlp.hook_pre_linear" in values:
        linear = values["mlp.hook_pre_linear"]
        yield from _seen(
            f"{norm}.hook_out @ W_gate + b_gate == mlp.hook_pre", lambda: read @ mlp.W_gate + mlp.b_gate, pre
        )
        yield from _seen(
            f"{norm}.hook_out @ W_in + b_in == mlp.hook_pre_linear",
            lambda: read @ mlp.W_in + mlp.b_in,
            linear,
        )
    else:
        yield from _seen(
            f"{norm}.hook_out @ W_in + b_in == mlp.hook_pre", lambda: read @ mlp.W_in + mlp.b_in, pre
        )
    post = values["mlp.hook_post"]
    yield from _seen(
        "mlp.hook_post @ W_out + b_out == output of the MLP", lambda: post @ mlp.W_out + mlp.b_out, output
    )


def _norm(
    block: "BlockWeights", name: str, normalized: "torch.Tensor", out: "torch.Tensor"
) -> Iterator[Identity]:
    yield from _seen(
        f"normalized value * {name}.w + {name}.b == output of {name}",
        lambda: _scaled(normalized, getattr(block, name)),
        out,
    )


def _scaled(normalized: "torch.Tensor", norm: "NormWeights") -> "torch.Tensor":
    return normalized.float() * norm.w.float() + norm.b.float()


def _root_mean_square(value: "torch.Tensor", eps: float) -> "torch.Tensor":
    value = value.float()
    return value * (value.square().mean(-1, keepdim=True) + eps).rsqrt()


def _seen(what: str, left: "Callable[[], torch.Tensor]", right: "torch.Tensor") -> Iterator[Identity]:
    """An identity, unless the model refuses to show a weight in it."""
    try:
        yield what, left(), right
    except ModelError:
        return

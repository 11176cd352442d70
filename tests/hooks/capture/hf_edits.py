"""Edits of hooks made on a Hugging Face model with nothing of ours: PyTorch's own hooks on its modules, found by names
that are written down here, and attention in the words of its paper.

Every edit adds noise to the value of a hook, so that it can be made wherever that value is a term.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Add = Callable[[Any, Tensor], contextlib.AbstractContextManager[None]]
"""Takes a layer, or the base model for what is outside of layers, and the noise; the edit ends with the context."""


@contextlib.contextmanager
def _removing(*handles: "torch.utils.hooks.RemovableHandle") -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def of_output(path: str, columns: slice = slice(None)) -> Add:
    """Add noise to the output of a module, in columns that hold heads side by side."""

    def add(root: nn.Module, noise: Tensor) -> contextlib.AbstractContextManager[None]:
        def after(_module: Any, _args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            flat = noise.reshape(*noise.shape[:2], -1)
            if value.ndim == 2:  # rows and positions are one axis
                flat = flat.reshape(-1, flat.shape[-1])
            changed = value + torch.zeros(flat.shape[:-1] + value.shape[-1:])
            changed[..., columns] += flat
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return _removing(root.get_submodule(path).register_forward_hook(after))

    return add


def of_input(path: str) -> Add:
    """Add noise to the input of a module, and nowhere else."""

    def add(root: nn.Module, noise: Tensor) -> contextlib.AbstractContextManager[None]:
        def before(_module: Any, args: Any, kwargs: Any) -> Any:
            value = args[0] if args else kwargs["hidden_states"]
            changed = value + noise.reshape(value.shape)
            return ((changed, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": changed})

        handle = root.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True)
        return _removing(handle)

    return add


def of_one_in_three(path: str, which: int, n_heads: int) -> Add:
    """Add noise to queries, keys or values that one module gives head by head, as in GPT-NeoX."""

    def add(root: nn.Module, noise: Tensor) -> contextlib.AbstractContextManager[None]:
        def after(_module: Any, _args: Any, output: Tensor) -> Tensor:
            changed = output.clone().view(*output.shape[:2], n_heads, 3, -1)
            changed[..., which, :] += noise
            return changed.view(output.shape)

        return _removing(root.get_submodule(path).register_forward_hook(after))

    return add


def of_heads(path: str) -> Add:
    """Add noise to the output of each head [batch, position, head, d_model], whose sum is the output of the module."""

    def add(root: nn.Module, noise: Tensor) -> contextlib.AbstractContextManager[None]:
        return of_output(path)(root, noise.sum(2))

    return add


Norm = Literal["layer", "rms", "rms of Gemma"]


def of_head_inputs(norm: str, parts: Mapping[str, tuple[slice, ...]]) -> Add:
    """Add noise [batch, position, head, d_model] to the stream as single heads see it, before the norm of attention.

    Args:
        norm: the norm.
        parts: columns of each head in the outputs of projections.
    """

    def add(root: nn.Module, noise: Tensor) -> contextlib.AbstractContextManager[None]:
        streams: list[Tensor] = []
        module = root.get_submodule(norm)

        def before(_module: Any, args: Any) -> None:
            streams[:] = [args[0]]

        def after(columns: tuple[slice, ...]) -> Any:
            def replaced(projection: Any, _args: Any, output: Tensor) -> Tensor:
                changed = output.clone()
                for index, place in enumerate(columns):
                    head = index % noise.shape[2]
                    own = projection.forward(module.forward(streams[0] + noise[:, :, head]))
                    changed[..., place] = own[..., place]
                return changed

            return replaced

        handles = [module.register_forward_pre_hook(before)]
        for path, columns in parts.items():
            handles.append(root.get_submodule(path).register_forward_hook(after(columns)))
        return _removing(*handles)

    return add


def of_norm(path: str, kind: Norm, what: Literal["scale", "normalized"]) -> Add:
    """Add noise inside of a norm: to its scale, or to the value divided by it."""

    def add(root: nn.Module, noise: Tensor) -> contextlib.AbstractContextManager[None]:
        def after(module: Any, args: Any, output: Tensor) -> Tensor:
            value = args[0]
            eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
            if kind == "layer":
                value = value - value.mean(-1, keepdim=True)
            scale = torch.sqrt((value**2).mean(-1, keepdim=True) + eps)
            added = (
                noise if value.ndim == noise.ndim else noise.flatten(0, 1)
            )  # rows and positions as one axis
            normalized = value / (scale + added) if what == "scale" else value / scale + added
            scaled: Tensor = normalized * (module.weight + (kind == "rms of Gemma"))
            return scaled + module.bias if kind == "layer" else scaled

        return _removing(root.get_submodule(path).register_forward_hook(after))

    return add


Inside = Literal["rot_q", "rot_k", "scores", "pattern"]
_INSIDES: Mapping[str, Inside] = {
    "rot_q": "rot_q",
    "rot_k": "rot_k",
    "attn_scores": "scores",
    "pattern": "pattern",
}


def _attention(
    what: Inside,
    noise: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    cap: Any,
) -> tuple[Tensor, Tensor]:
    """Output [batch, head, position, d_head] and pattern, by https://arxiv.org/abs/1706.03762, section 3.2.1."""
    if what == "rot_q":
        query = query + noise.transpose(1, 2)
    if what == "rot_k":
        key = key + noise.transpose(1, 2)
    scores = torch.empty(*query.shape[:3], key.shape[2])
    for head in range(query.shape[1]):
        # Heads in a row share keys and values.
        scores[:, head] = (
            query[:, head] @ key[:, head * key.shape[1] // query.shape[1]].transpose(1, 2) * scaling
        )
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if what == "scores":
        scores = scores + noise
    pattern = torch.softmax(scores + mask, -1)
    if what == "pattern":
        pattern = pattern + noise
    of_heads = [
        pattern[:, head] @ value[:, head * value.shape[1] // query.shape[1]] for head in range(query.shape[1])
    ]
    return torch.stack(of_heads, 1), pattern


def of_attention(path: str, what: Inside) -> Add:
    """Add noise inside of the attention function of a model that was loaded with ``eager`` attention."""

    @contextlib.contextmanager
    def add(root: nn.Module, noise: Tensor) -> Iterator[None]:
        wanted: Any = root.get_submodule(path)
        home: Any = sys.modules[type(wanted).__module__]
        original = home.eager_attention_forward

        def edited(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> tuple[Tensor, Tensor]:
            if module is not wanted:
                given: tuple[Tensor, Tensor] = original(module, query, key, value, mask, **options)
                return given
            cap = options.get("softcap")
            out, pattern = _attention(what, noise, query, key, value, mask, options["scaling"], cap)
            return out.transpose(1, 2), pattern

        home.eager_attention_forward = edited
        try:
            yield
        finally:
            home.eager_attention_forward = original

    return add


def of_own_attention(path: str, what: Inside, *, is_scaled: bool) -> Add:
    """Add noise inside of attention of GPT-J and GPT-Neo, which compute it in a method."""

    @contextlib.contextmanager
    def add(root: nn.Module, noise: Tensor) -> Iterator[None]:
        module: Any = root.get_submodule(path)

        def edited(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            scaling = query.shape[-1] ** -0.5 if is_scaled else 1.0
            return _attention(what, noise, query, key, value, mask, scaling, None)

        module._attn = edited
        try:
            yield
        finally:
            del module._attn

    return add


@dataclass(frozen=True)
class Family:
    """The edits of all hooks of one family, by the modules of transformers."""

    layers: str
    in_layer: Mapping[str, Add]
    outside: Mapping[str, Add]


def _norms(name: str, path: str, kind: Norm) -> dict[str, Add]:
    return {
        f"{name}.hook_scale": of_norm(path, kind, "scale"),
        f"{name}.hook_normalized": of_norm(path, kind, "normalized"),
    }


def _insides(path: str, *, rotary: bool = True) -> dict[str, Add]:
    edits = {
        "attn.hook_attn_scores": of_attention(path, "scores"),
        "attn.hook_pattern": of_attention(path, "pattern"),
    }
    if rotary:
        edits["attn.hook_rot_q"] = of_attention(path, "rot_q")
        edits["attn.hook_rot_k"] = of_attention(path, "rot_k")
    return edits


def _layer(attention_out: str, mlp_out: str, ln1: str, ln2: str | None, kind: Norm) -> dict[str, Add]:
    """The edits that all layers have.

    Args:
        attention_out: module whose output attention adds to the stream.
        mlp_out: module whose output the MLP adds.
        ln1: norm before attention.
        ln2: norm before the MLP, if that has one of its own.
        kind: kind of both norms.
    """
    edits = {
        "hook_resid_pre": of_input(""),
        "hook_resid_post": of_output(""),
        "hook_attn_out": of_output(attention_out),
        "hook_mlp_out": of_output(mlp_out),
        **_norms("ln1", ln1, kind),
        "ln1.hook_out": of_output(ln1),
    }
    if ln2 is not None:
        edits |= _norms("ln2", ln2, kind)
        edits["ln2.hook_out"] = of_output(ln2)
    return edits


def _between(attention_out: str, ln2: str) -> dict[str, Add]:
    """The edits of layers whose MLP reads the stream after attention, of which the output of attention is one term."""
    return {"hook_resid_mid": of_output(attention_out), "hook_mlp_in": of_input(ln2)}


def _projections(path: str, out: str) -> dict[str, Add]:
    return {
        "attn.hook_q": of_output(f"{path}.q_proj"),
        "attn.hook_k": of_output(f"{path}.k_proj"),
        "attn.hook_v": of_output(f"{path}.v_proj"),
        **_heads(out),
    }


def _side_by_side(start: int, n_heads: int) -> tuple[slice, ...]:
    """The columns of heads of the tiny models, which are 16 wide."""
    return tuple(slice(start + 16 * head, start + 16 * head + 16) for head in range(n_heads))


def _copies(norm: str, places: Mapping[str, tuple[str, tuple[slice, ...]]]) -> dict[str, Add]:
    """The edits of copies of the stream, from (projection, columns of its heads) of q, k and v."""
    edits = {f"hook_{name}_input": of_head_inputs(norm, {path: at}) for name, (path, at) in places.items()}
    if len({len(columns) for _, columns in places.values()}) == 1:
        whole: dict[str, tuple[slice, ...]] = {}
        for path, columns in places.values():
            whole[path] = whole.get(path, ()) + columns
        edits["hook_attn_in"] = of_head_inputs(norm, whole)
    return edits


def _copies_of(norm: str, path: str, key_heads: int = 4) -> dict[str, Add]:
    heads = {"q": 4, "k": key_heads, "v": key_heads}
    return _copies(
        norm, {name: (f"{path}.{name}_proj", _side_by_side(0, heads[name])) for name in ("q", "k", "v")}
    )


def _heads(out: str) -> dict[str, Add]:
    return {"attn.hook_z": of_input(out), "attn.hook_result": of_heads(out)}


def _mlp(pre: str, out: str, linear: str | None = None) -> dict[str, Add]:
    edits = {"mlp.hook_pre": of_output(pre), "mlp.hook_post": of_input(out)}
    return edits if linear is None else edits | {"mlp.hook_pre_linear": of_output(linear)}


def _llama(
    kind: Norm = "rms", attention_out: str = "self_attn", mlp_out: str = "mlp", ln2: str = ""
) -> dict[str, Add]:
    ln2 = ln2 or "post_attention_layernorm"
    return {
        **_layer(attention_out, mlp_out, "input_layernorm", ln2, kind),
        **_between(attention_out, ln2),
        **_projections("self_attn", "self_attn.o_proj"),
        **_copies_of("input_layernorm", "self_attn", key_heads=2),
        **_insides("self_attn"),
        **_mlp("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
    }


def _without(adds: Mapping[str, Add], *prefixes: str) -> dict[str, Add]:
    return {leaf: add for leaf, add in adds.items() if not leaf.startswith(prefixes)}


_D, _HEADS, _KEYS, _NEURONS = 64, 4, 2, 128
"""Sizes of the tiny models of the tests: width, heads, heads of keys and values, neurons."""
_D_KEYS = _D * _KEYS // _HEADS

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        "h",
        {
            **_layer("attn", "mlp", "ln_1", "ln_2", "layer"),
            **_between("attn", "ln_2"),
            "attn.hook_q": of_output("attn.c_attn", slice(_D)),
            "attn.hook_k": of_output("attn.c_attn", slice(_D, 2 * _D)),
            "attn.hook_v": of_output("attn.c_attn", slice(2 * _D, 3 * _D)),
            **_copies(
                "ln_1",
                {name: ("attn.c_attn", _side_by_side(64 * which, 4)) for which, name in enumerate("qkv")},
            ),
            **_heads("attn.c_proj"),
            **_insides("attn", rotary=False),
            **_mlp("mlp.c_fc", "mlp.c_proj"),
        },
        {
            "hook_embed": of_output("wte"),
            "hook_pos_embed": of_output("wpe"),
            **_norms("ln_final", "ln_f", "layer"),
        },
    ),
    "gpt_neo": Family(
        "h",
        {
            **_layer("attn", "mlp", "ln_1", "ln_2", "layer"),
            **_between("attn", "ln_2"),
            **_projections("attn.attention", "attn.attention.out_proj"),
            **_copies_of("ln_1", "attn.attention"),
            "attn.hook_attn_scores": of_own_attention("attn.attention", "scores", is_scaled=False),
            "attn.hook_pattern": of_own_attention("attn.attention", "pattern", is_scaled=False),
            **_mlp("mlp.c_fc", "mlp.c_proj"),
        },
        {
            "hook_embed": of_output("wte"),
            "hook_pos_embed": of_output("wpe"),
            **_norms("ln_final", "ln_f", "layer"),
        },
    ),
    "gptj": Family(
        "h",
        {
            **_layer("attn", "mlp", "ln_1", None, "layer"),
            **_projections("attn", "attn.out_proj"),
            **_copies_of("ln_1", "attn"),
            **{
                f"attn.hook_{name}": of_own_attention("attn", what, is_scaled=True)
                for name, what in _INSIDES.items()
            },
            **_mlp("mlp.fc_in", "mlp.fc_out"),
        },
        {"hook_embed": of_output("wte"), **_norms("ln_final", "ln_f", "layer")},
    ),
    "gpt_neox": Family(
        "layers",
        {
            **_layer("attention", "mlp", "input_layernorm", "post_attention_layernorm", "layer"),
            **{
                f"attn.hook_{name}": of_one_in_three("attention.query_key_value", which, _HEADS)
                for which, name in enumerate("qkv")
            },
            **_copies(
                "input_layernorm",
                {
                    name: (
                        "attention.query_key_value",
                        tuple(
                            slice(16 * (3 * head + which), 16 * (3 * head + which) + 16) for head in range(4)
                        ),
                    )
                    for which, name in enumerate("qkv")
                },
            ),
            **_heads("attention.dense"),
            **_insides("attention"),
            **_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        },
        {"hook_embed": of_output("embed_in"), **_norms("ln_final", "final_layer_norm", "layer")},
    ),
    "llama": Family(
        "layers", _llama(), {"hook_embed": of_output("embed_tokens"), **_norms("ln_final", "norm", "rms")}
    ),
    "mixtral": Family(
        "layers",
        _without(_llama(), "mlp."),
        {"hook_embed": of_output("embed_tokens"), **_norms("ln_final", "norm", "rms")},
    ),
    "phi3": Family(
        "layers",
        {
            **_llama(),
            **_copies(
                "input_layernorm",
                {
                    "q": ("self_attn.qkv_proj", _side_by_side(0, 4)),
                    "k": ("self_attn.qkv_proj", _side_by_side(64, 2)),
                    "v": ("self_attn.qkv_proj", _side_by_side(96, 2)),
                },
            ),
            "attn.hook_q": of_output("self_attn.qkv_proj", slice(_D)),
            "attn.hook_k": of_output("self_attn.qkv_proj", slice(_D, _D + _D_KEYS)),
            "attn.hook_v": of_output("self_attn.qkv_proj", slice(_D + _D_KEYS, _D + 2 * _D_KEYS)),
            "mlp.hook_pre": of_output("mlp.gate_up_proj", slice(_NEURONS)),
            "mlp.hook_pre_linear": of_output("mlp.gate_up_proj", slice(_NEURONS, 2 * _NEURONS)),
        },
        {"hook_embed": of_output("embed_tokens"), **_norms("ln_final", "norm", "rms")},
    ),
    "opt": Family(
        "decoder.layers",
        {
            **_layer("self_attn", "fc2", "self_attn_layer_norm", "final_layer_norm", "layer"),
            **_between("self_attn", "final_layer_norm"),
            **_projections("self_attn", "self_attn.out_proj"),
            **_copies_of("self_attn_layer_norm", "self_attn"),
            **_insides("self_attn", rotary=False),
            **_mlp("fc1", "fc2"),
        },
        {
            "hook_embed": of_output("decoder.embed_tokens"),
            "hook_pos_embed": of_output("decoder.embed_positions"),
            **_norms("ln_final", "decoder.final_layer_norm", "layer"),
        },
    ),
    "gemma2": Family(
        "layers",
        _llama(
            "rms of Gemma",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "pre_feedforward_layernorm",
        ),
        {"hook_embed": of_output("embed_tokens"), **_norms("ln_final", "norm", "rms of Gemma")},
    ),
}

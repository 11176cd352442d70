"""The parts of a hooked model as attributes: ``model.blocks[3].attn.hook_z``, ``model.unembed.W_U``.

A part has the hooks and the weights under its name, and may be called if it is a layer, or a single module of the
model computes it.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import HookError
from actstore.hooks.capture.functions import HookFunctions
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.naming.names import HookNames
from actstore.hooks.weights.block_weights import AttentionWeights, BlockWeights, MlpWeights
from actstore.hooks.weights.model_weights import Weights
from actstore.hooks.weights.norms import NormWeights
from actstore.hooks.weights.used_weights import placed_for

if TYPE_CHECKING:
    import torch
    from torch import nn

    from actstore.hooks.loaded_model import LoadedModel

_NORM: Final = tuple(NormWeights.__annotations__)


class Part:
    """A part of a hooked model."""

    def __init__(
        self,
        path: str,
        functions: HookFunctions,
        attributes: Mapping[str, Callable[[], Any]],
        run: Callable[..., Any] | None = None,
    ) -> None:
        """
        Args:
            path: what the names of its hooks begin with, such as ``blocks.3.attn``.
            functions: the functions on the hooks of the model.
            attributes: its weights and smaller parts, each as a function that gives it.
            run: what a call of this part does; None if it cannot be called.
        """
        own: Mapping[str, Any] = {
            "_path": path,
            "_functions": functions,
            "_attributes": attributes,
            "_run": run,
        }
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        if name in self._attributes:
            return self._attributes[name]()
        if name.startswith("hook_"):
            return hook_of(self._functions, f"{self._path}.{name}")
        raise AttributeError(f"{self._path} has no attribute {name!r}; it has {', '.join(self._listed())}")

    def __setattr__(self, name: str, value: Any) -> None:
        del value
        raise AttributeError(
            f"{self._path}.{name} cannot be replaced; write into the tensor (model.{self._path}.{name}[:] = ...), or "
            "change the modules of model.hf"
        )

    def __call__(self, value: "torch.Tensor", *arguments: Any, **options: Any) -> "torch.Tensor":
        """What this part of the model gives for a value.

        A layer is run by the model, from ``start_at_layer`` to the next, with the functions on its hooks and the
        options of a call. The call of another part runs its module, and hooks do not see it.

        Args:
            value: for ``embed`` and ``pos_embed`` token ids [batch, position], else the input [..., d_model].
            arguments: for ``pos_embed``: the number of earlier positions, and an attention mask.
            options: the same by name, ``past_kv_pos_offset`` and ``attention_mask``; or those of the model.

        Raises:
            TypeError: no single module of the model computes this part.
        """
        if self._run is None:
            raise TypeError(f"{self._path} cannot be called; call the model with functions on its hooks")
        result: torch.Tensor = self._run(value, *arguments, **options)
        return result

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._listed()]

    def __repr__(self) -> str:
        return f"<{self._path}: {', '.join(self._listed())}>"

    def _listed(self) -> list[str]:
        return [*leaves_under(self._functions.names_of_model, self._path), *self._attributes]


def hook_of(functions: HookFunctions, name: str) -> HookPoint:
    """The hook of this name, as an attribute.

    Raises:
        AttributeError: the model does not have it; the message says why, or what comes nearest.
    """
    try:
        return functions.point(name)
    except HookError as error:
        raise AttributeError(str(error)) from error


def leaves_under(names: HookNames, path: str) -> list[str]:
    """The hooks whose names are a path and one more word."""
    before = f"{path}." if path else ""
    ends = (name.removeprefix(before) for name in names if name.startswith(before))
    return [end for end in ends if "." not in end]


def _by_module(module: "Callable[[], nn.Module]", value: "torch.Tensor") -> "torch.Tensor":
    """What the module that is there now gives for a value, on its device and in its dtype."""
    runs = module()
    given = placed_for(runs, value) if value.is_floating_point() else value
    result: torch.Tensor | tuple[torch.Tensor, ...] = runs(given)
    return result[0] if isinstance(result, tuple) else result


def block(
    model: "LoadedModel", functions: HookFunctions, layer: int, run: "Callable[..., torch.Tensor]"
) -> Part:
    """A layer, with its attention, MLP and norms.

    Args:
        model: the model.
        functions: the functions on its hooks.
        layer: number of the layer.
        run: runs the layer over a residual stream.
    """
    weights, module, family = model.weights.blocks[layer], model.layers[layer], model.architecture
    path = f"blocks.{layer}"
    parts: dict[str, Callable[[], Any]] = {
        "attn": partial(Part, f"{path}.attn", functions, _weights(weights.attn, AttentionWeights))
    }
    mlp = family.mlp_at(model.cfg.original, layer)
    run_mlp = None if mlp is None else partial(_by_module, partial(module.get_submodule, mlp.module))
    parts["mlp"] = partial(Part, f"{path}.mlp", functions, _weights(weights.mlp, MlpWeights), run_mlp)
    norms = {name: getattr(family, name) for name in ("ln1", "ln2", "ln1_post", "ln2_post")}
    for name, place in norms.items():
        # Without the norm, its weights say why there is none.
        parts[name] = (
            partial(getattr, weights, name)
            if place is None
            else partial(
                _norm,
                f"{path}.{name}",
                functions,
                partial(getattr, weights, name),
                module.get_submodule,
                place,
            )
        )
    return Part(path, functions, parts, run)


def outside(model: "LoadedModel", functions: HookFunctions) -> Mapping[str, Part]:
    """The parts of a model beside its layers."""
    weights, family = model.weights, model.architecture

    def part(name: str, leaves: Iterable[str], run: Callable[..., Any] | None) -> Part:
        return Part(name, functions, {leaf: partial(getattr, weights, leaf) for leaf in leaves}, run)

    embed = partial(_by_module, partial(model.base.get_submodule, family.embed))
    unembed = partial(_by_module, model.hf.get_output_embeddings) if model.has_head else None
    parts = {"embed": part("embed", ["W_E"], embed), "unembed": part("unembed", ["W_U", "b_U"], unembed)}
    if family.pos_embed is not None:
        parts["pos_embed"] = part("pos_embed", ["W_pos"], partial(embedded_positions, weights))
    if family.ln_final is not None:
        given = partial(getattr, weights, "ln_final")
        parts["ln_final"] = _norm("ln_final", functions, given, model.base.get_submodule, family.ln_final)
    return parts


def embedded_positions(
    weights: Weights,
    tokens: "torch.Tensor",
    past_kv_pos_offset: int = 0,
    attention_mask: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """The embeddings of the positions of ids: [batch, position, d_model], 0 at padding.

    Args:
        weights: the weights of the model.
        tokens: ids [batch, position].
        past_kv_pos_offset: number of earlier positions.
        attention_mask: [batch, position] of earlier positions and these, 0 at padding, which is not counted.
    """
    import torch

    if attention_mask is None:
        attention_mask = tokens.new_ones(len(tokens), past_kv_pos_offset + tokens.shape[1])
    mask = attention_mask.to(weights.W_pos.device).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)[:, past_kv_pos_offset:]
    embedded: torch.Tensor = weights.W_pos[places] * mask[:, past_kv_pos_offset:, None]
    return embedded


def _norm(
    path: str,
    functions: HookFunctions,
    weights: Callable[[], NormWeights],
    submodule: "Callable[[str], nn.Module]",
    place: str,
) -> Part:
    return Part(
        path,
        functions,
        {leaf: lambda leaf=leaf: getattr(weights(), leaf) for leaf in _NORM},  # type: ignore[misc]
        partial(_by_module, partial(submodule, place)),
    )


def _weights(
    weights: Any, kind: type[BlockWeights | AttentionWeights | MlpWeights]
) -> dict[str, Callable[[], Any]]:
    """The weights of a layer's part by name, each as a function that gives it."""
    names = [name for name, member in vars(kind).items() if isinstance(member, property)]
    return {name: partial(getattr, weights, name) for name in names}

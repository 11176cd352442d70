"""The parts of a hooked model as attributes: ``model.blocks[3].attn.hook_z``, ``model.unembed.W_U``.

A part has the hooks and the weights under its name, and may be called if a single module of the model computes it.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import HookError
from actstore.hooks.capture.functions import HookFunctions
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.naming.names import HookNames
from actstore.hooks.weights.block_weights import AttentionWeights, BlockWeights, MlpWeights
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
        module: "Callable[[], nn.Module] | None" = None,
    ) -> None:
        """
        Args:
            path: what the names of its hooks begin with, such as ``blocks.3.attn``.
            functions: the functions on the hooks of the model.
            attributes: its weights and smaller parts, each as a function that gives it.
            module: gives the module that a call of this part runs; None if it cannot be called.
        """
        own: Mapping[str, Any] = {
            "_path": path,
            "_functions": functions,
            "_attributes": attributes,
            "_module": module,
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

    def __call__(self, value: "torch.Tensor") -> "torch.Tensor":
        """What the module of the model gives for a value; hooks do not see this call.

        Args:
            value: for ``embed`` token ids [batch, position], else the input [..., d_model].

        Raises:
            TypeError: no single module of the model computes this part.
        """
        if self._module is None:
            raise TypeError(f"{self._path} cannot be called; call the model with functions on its hooks")
        module = self._module()
        given = placed_for(module, value) if value.is_floating_point() else value
        result: torch.Tensor | tuple[torch.Tensor, ...] = module(given)
        return result[0] if isinstance(result, tuple) else result

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


def block(model: "LoadedModel", functions: HookFunctions, layer: int) -> Part:
    """A layer, with its attention, MLP and norms."""
    weights, module, family = model.weights.blocks[layer], model.layers[layer], model.architecture
    path = f"blocks.{layer}"
    parts: dict[str, Callable[[], Any]] = {
        "attn": partial(Part, f"{path}.attn", functions, _weights(weights.attn, AttentionWeights))
    }
    mlp = family.mlp_at(model.cfg.original, layer)
    run = None if mlp is None else partial(module.get_submodule, mlp.module)
    parts["mlp"] = partial(Part, f"{path}.mlp", functions, _weights(weights.mlp, MlpWeights), run)
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
    return Part(path, functions, parts)


def outside(model: "LoadedModel", functions: HookFunctions) -> Mapping[str, Part]:
    """The parts of a model beside its layers."""
    weights, family = model.weights, model.architecture

    def part(name: str, leaves: Iterable[str], module: "Callable[[], nn.Module] | None") -> Part:
        return Part(name, functions, {leaf: partial(getattr, weights, leaf) for leaf in leaves}, module)

    parts = {
        "embed": part("embed", ["W_E"], partial(model.base.get_submodule, family.embed)),
        "unembed": part(
            "unembed", ["W_U", "b_U"], model.hf.get_output_embeddings if model.has_head else None
        ),
    }
    if family.pos_embed is not None:
        parts["pos_embed"] = part("pos_embed", ["W_pos"], None)
    if family.ln_final is not None:
        given = partial(getattr, weights, "ln_final")
        parts["ln_final"] = _norm("ln_final", functions, given, model.base.get_submodule, family.ln_final)
    return parts


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
        partial(submodule, place),
    )


def _weights(
    weights: Any, kind: type[BlockWeights | AttentionWeights | MlpWeights]
) -> dict[str, Callable[[], Any]]:
    """The weights of a layer's part by name, each as a function that gives it."""
    names = [name for name, member in vars(kind).items() if isinstance(member, property)]
    return {name: partial(getattr, weights, name) for name in names}

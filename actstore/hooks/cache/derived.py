"""Computing hook values from others by the operations of the forward, in the same order.

From values as the model computed them, the same operations give the same bits. From values that were rounded (a store
of another dtype), they give the value up to that rounding. Patterns below float32 are also equal up to rounding only:
the model takes the softmax of scores before they are rounded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from actstore.hooks.families.config import HookedConfig
from actstore.hooks.naming.names import HookNames, join, split
from actstore.hooks.weights.norms import normalize

if TYPE_CHECKING:
    import torch

    from actstore.hooks.weights.model_weights import Weights


@dataclass(frozen=True)
class Way:
    """One way to compute a value from others."""

    needs: tuple[str, ...]
    """Names of the values that `make` takes."""
    make: Callable[..., "torch.Tensor"]
    """A function of the values, in the order of `needs`, that returns the new value."""

    def then(self, function: Callable[["torch.Tensor"], "torch.Tensor"]) -> "Way":
        """This way, followed by one more operation."""
        return Way(self.needs, lambda *values: function(self.make(*values)))


class Derivation:
    """All ways to the hook values of one model, each from values of the same layer or at its borders."""

    def __init__(self, names: HookNames, cfg: HookedConfig, weights: Callable[[str], "Weights"]) -> None:
        """
        Args:
            names: hooks of the model.
            cfg: its sizes.
            weights: returns its weights, and takes the name of what needs them, for an error if there are none.
        """
        self._names = names
        self._cfg = cfg
        self._weights = weights

    def ways(self, name: str) -> tuple[Way, ...]:
        """Ways to the value of a canonical name. The first is the value itself, the others begin with the shortest."""
        others = (way for way in self._others(name) if name not in way.needs)
        ways = (Way((name,), _itself), *others)
        return tuple(way for way in ways if all(need in self._names for need in way.needs))

    def _others(self, name: str) -> Iterator[Way]:
        layer, leaf = split(name)
        if layer is None:
            if leaf.startswith("ln_final."):
                yield from self._in_norm(leaf, f"blocks.{self._cfg.n_layers - 1}.hook_resid_post")
            return
        if leaf == "hook_resid_pre" and layer > 0:
            yield from self.ways(join(layer - 1, "hook_resid_post"))
        elif leaf == "hook_resid_mid":
            yield from self._mid(layer)
        elif leaf == "hook_resid_post":
            yield from self._post(layer)
        elif leaf == "hook_mlp_in":
            yield from self.ways(join(layer, "hook_resid_mid"))
        elif leaf.startswith("ln1.hook_"):
            yield from self._in_norm(leaf, join(layer, "hook_resid_pre"))
        elif leaf.startswith("ln2.hook_"):
            stream = "hook_resid_pre" if self._cfg.parallel_attn_mlp else "hook_resid_mid"
            yield from self._in_norm(leaf, join(layer, stream))
        elif leaf == "attn.hook_pattern":
            yield Way((join(layer, "attn.hook_attn_scores"),), _softmax)
        elif leaf == "attn.hook_result":
            yield Way(
                (join(layer, "attn.hook_z"),),
                lambda z: head_results(z, self._weights(name).blocks[layer].attn.W_O),
            )
        elif leaf == "mlp.hook_post" and self._cfg.act_fn is not None:
            linear = join(layer, "mlp.hook_pre_linear")
            needs = (join(layer, "mlp.hook_pre"), *([linear] if linear in self._names else []))
            yield Way(needs, self._activated)

    def _into(self, layer: int) -> Iterator[str]:
        """Both names of the residual stream into a layer."""
        yield join(layer, "hook_resid_pre")
        if layer > 0:
            yield join(layer - 1, "hook_resid_post")

    def _mid(self, layer: int) -> Iterator[Way]:
        for stream in self._into(layer):
            yield Way((stream, join(layer, "hook_attn_out")), lambda pre, attn_out: pre + attn_out)

    def _post(self, layer: int) -> Iterator[Way]:
        if layer + 1 < self._cfg.n_layers:
            yield Way((join(layer + 1, "hook_resid_pre"),), _itself)
        mlp_out = join(layer, "hook_mlp_out")
        yield Way((join(layer, "hook_resid_mid"), mlp_out), lambda mid, mlp_out: mid + mlp_out)
        for stream in self._into(layer):
            needs = (stream, join(layer, "hook_attn_out"), mlp_out)
            if self._cfg.parallel_attn_mlp:
                yield Way(needs, lambda pre, attn_out, mlp_out: attn_out + mlp_out + pre)
            else:
                yield Way(needs, lambda pre, attn_out, mlp_out: pre + attn_out + mlp_out)

    def _in_norm(self, leaf: str, stream: str) -> Iterator[Way]:
        which = leaf.rsplit(".hook_", 1)[-1]
        if which in ("scale", "normalized"):
            yield from (
                way.then(lambda value: self._normalize(value)[which == "normalized"])
                for way in self.ways(stream)
            )

    def _normalize(self, value: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        norm: Literal["layer", "rms"] = "layer" if self._cfg.normalization_type == "LN" else "rms"
        scale, normalized = normalize(value, self._cfg.eps, norm=norm)
        return scale.to(value.dtype), normalized.to(value.dtype)

    def _activated(self, pre: "torch.Tensor", *linear: "torch.Tensor") -> "torch.Tensor":
        from transformers.activations import ACT2FN

        activated: torch.Tensor = ACT2FN[self._cfg.act_fn](pre)
        return activated * linear[0] if linear else activated


def head_results(z: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """The output of each head [..., head, d_model], from z [..., head, d_head] and W_O [head, d_head, d_model]."""
    import torch

    z, weight = together(z, weight)
    return torch.einsum("...he,hed->...hd", z, weight)


def together(value: "torch.Tensor", weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """A value and a weight made ready to be multiplied: on the device of the value, in the wider of their dtypes."""
    import torch

    dtype = torch.promote_types(value.dtype, weight.dtype)
    if not value.requires_grad:
        weight = weight.detach()
    return value.to(dtype), weight.to(value.device, dtype)


def is_one_stream(*names: str) -> bool:
    """Whether these are names of one residual stream: out of a layer, and into the next."""
    layers = set()
    for name in names:
        layer, leaf = split(name)
        if layer is None or leaf not in ("hook_resid_pre", "hook_resid_post"):
            return False
        layers.add(layer + (leaf == "hook_resid_post"))
    return len(layers) == 1


def _itself(value: Any) -> Any:
    return value


def _softmax(scores: "torch.Tensor") -> "torch.Tensor":
    """The pattern of scores; rows in which everything is masked are 0."""
    blind = scores.isneginf().all(-1, keepdim=True)
    return scores.float().masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0).to(scores.dtype)

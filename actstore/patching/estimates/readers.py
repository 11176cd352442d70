"""The gradient of the metric with respect to the residual stream as one reader alone sees it.

A head reads the stream through the norm before attention and its own columns of W_Q, W_K or W_V. So the gradient at its
queries, which a backward pass gives, goes back through these, which is exact and costs one product a head.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from actstore.errors import ModelError
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.patching.estimates.norm_jacobian import NormJacobian
from actstore.patching.estimates.runs import CorruptedRun

if TYPE_CHECKING:
    import torch

_HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
_NEURONS = ("mlp.hook_pre", "mlp.hook_pre_linear")


def names_of_readers(model: HookedModel) -> list[str]:
    """The hooks whose gradients are needed.

    Raises:
        ModelError: the readers of this model cannot be told apart.
    """
    if model.architecture.attention is None:
        raise ModelError(
            f"only the residual stream of a {model.cfg.model_type} model is known, not its heads, so it has no edges"
        )
    names = []
    for layer in range(model.cfg.n_layers):
        names += [join(layer, leaf) for leaf in ("hook_resid_pre", *_HEADS)]
        if join(layer, "hook_mlp_in") in model.names:
            names.append(join(layer, "hook_mlp_in"))
            continue
        neurons = [join(layer, leaf) for leaf in _NEURONS if join(layer, leaf) in model.names]
        if not neurons:
            raise ModelError(
                f"the MLP of layer {layer} runs beside attention and has no neurons, so what it reads is not known"
            )
        names += neurons
    return [*names, join(model.cfg.n_layers - 1, "hook_resid_post")]


def gradients_of_readers(
    model: HookedModel, run: CorruptedRun
) -> "Iterator[tuple[int | None, Sequence[torch.Tensor]]]":
    """The gradients at the inputs of the readers, in the order of `actstore.patching.estimates.edges.readers`.

    Args:
        model: the model.
        run: the corrupted run, with the hooks of `names_of_readers`.

    Yields:
        (layer, gradients of its readers, each float32 [reader, prompt, position, d_model]); the layer of the logits is
        None.
    """
    family = model.architecture
    for layer in range(model.cfg.n_layers):
        stream = run.values[join(layer, "hook_resid_pre")]
        norm = model.layers[layer].get_submodule(family.ln1) if family.ln1 is not None else None
        before_attention = NormJacobian(norm, family.norm, stream)
        groups = [before_attention.of_gradient(_through_heads(model, layer, leaf, run)) for leaf in _HEADS]
        groups.append(_of_mlp(model, layer, run, before_attention)[None])
        yield layer, groups
    yield None, [run.gradients[join(model.cfg.n_layers - 1, "hook_resid_post")].float()[None]]


def _through_heads(model: HookedModel, layer: int, leaf: str, run: CorruptedRun) -> "torch.Tensor":
    """The gradient behind the norm that each head's projection gives back [head, prompt, position, d_model]."""
    import torch

    gradient = run.gradients[join(layer, leaf)]
    weights = model.weights.blocks[layer].attn
    weight = {"attn.hook_q": "W_Q", "attn.hook_k": "W_K", "attn.hook_v": "W_V"}[leaf]
    per_head = getattr(weights, weight).detach()  # [query head, d_model, d_head]
    n_shared = len(per_head) // gradient.shape[2]
    # Heads that share keys and values have the same weight.
    return torch.einsum("bphe,hde->hbpd", gradient.float(), per_head[::n_shared].float())


def _of_mlp(
    model: HookedModel, layer: int, run: CorruptedRun, before_attention: NormJacobian
) -> "torch.Tensor":
    """The gradient at the input of the MLP [prompt, position, d_model]."""
    import torch

    family = model.architecture
    own_input = join(layer, "hook_mlp_in")
    if own_input in run.gradients:
        return run.gradients[own_input].float()
    weights = model.weights.blocks[layer].mlp
    names = [join(layer, leaf) for leaf in _NEURONS]
    is_gated = names[1] in run.gradients
    matrices = [weights.W_gate, weights.W_in] if is_gated else [weights.W_in]
    products = [
        run.gradients[name].float() @ matrix.detach().float().T
        for name, matrix in zip(names, matrices, strict=False)
    ]
    behind = torch.stack(products).sum(0)
    norm = before_attention
    if family.ln2 is not None:
        module = model.layers[layer].get_submodule(family.ln2)
        norm = NormJacobian(module, family.norm, run.values[join(layer, "hook_resid_pre")])
    return norm.of_gradient(behind)

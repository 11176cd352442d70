"""The golden check: one row of what a worker captured against the plain Hugging Face forward of that row alone."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import ModelError
from actstore.hooks.exclusive import exclusive
from actstore.hooks.names import join, split
from actstore.hooks.point import point_of
from actstore.hooks.site import AnySite, Site, sites_in_layer, sites_outside
from actstore.store.commit import Golden
from actstore.store.plan import Segment

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from actstore.hooks.model import HookedModel

_TOLERANCE: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Of `relative_error`, by dtype. Rounding alone gives 1e-6, 2e-3 and 1.6e-2 at most, over all hooks of the families in
the table and of SmolLM2 with its 30 layers; another row gives 0.2 and more, but for patterns of random weights, which
are nearly the same everywhere: 0.1.
"""
_TOLERANCE_OF_MIXTURES: Final = 0.3
"""Rounding can send a position to another expert where two come out alike, and then it differs as a whole."""
_SHARE_OF_SCALES: Final = 0.2
"""Scales differ little from row to row; rounding moves them by a quarter of what it moves vectors by."""
_BLOCK = 256
"""Positions compared at once: patterns of a long row are large."""


def sampled_row(tokens_sha256: str, segment: Segment) -> int:
    """The row of a segment that is checked, drawn by a hash: the same one wherever the segment is computed."""
    digest = hashlib.sha256(f"{tokens_sha256}:{segment.index}".encode()).digest()
    return segment.start + int.from_bytes(digest[:8], "little") % segment.n_sequences


def golden(
    model: "HookedModel",
    tokens: "NDArray[Any]",
    length: int,
    captured: "Mapping[str, torch.Tensor]",
    sequence: int,
) -> Golden:
    """Compute one row once more, alone, and compare with it what was captured in a batch.

    Costs one forward of one row, and a second one if there are hooks that the plain forward does not show.

    Args:
        model: the one that captured.
        tokens: int32 [context_length], the row of token ids.
        length: how many of them are real; the rest is padding.
        captured: by hook, the row as it goes into the store, [context_length, *shape].
        sequence: row of the store.

    Raises:
        ModelError: a hook is off by more than rounding can explain.
    """
    expected = recomputed(model, tokens, length, list(captured))
    errors = {hook: relative_error(captured[hook][:length], value) for hook, value in expected.items()}
    for hook, error in errors.items():
        allowed = tolerance(model, hook)
        if not error <= allowed:  # also when it is not a number
            raise ModelError(
                f"{hook} of sequence {sequence} was captured {error:.2g} away, relative to its size, from what the "
                f"plain Hugging Face forward of that row gives, and {allowed:.2g} is allowed in "
                f"{_dtype(model)}; the segment was not committed, for it would be wrong: try another device, "
                "batch_size or attention implementation, or other versions of torch and transformers"
            )
    return Golden(sequence=sequence, errors=errors)


def tolerance(model: "HookedModel", hook: str) -> float:
    """The largest `relative_error` between two forwards of one row in different batches that rounding explains."""
    config: Any = model.base.config
    is_mixture = any(
        "experts" in field and isinstance(value, int) and value > 1 for field, value in vars(config).items()
    )
    largest = _TOLERANCE_OF_MIXTURES if is_mixture else _TOLERANCE[_dtype(model)]
    return largest * _SHARE_OF_SCALES if hook.endswith("hook_scale") else largest


def relative_error(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """How far ``found`` is from ``expected``, both [position, ...]: 0 for equal values, about 1 for unrelated ones.

    The root mean square over positions of ``||found - expected|| / max(||expected||, m)``, where m is the median of
    ``||expected||`` over positions. A Frobenius norm over the row would be that of a few positions: the stream of a
    trained model is so large at some (https://arxiv.org/abs/2402.17762) that another row's is only 0.04 away.

    Infinite if a value that is not finite, such as the score of a position that is masked, has not the same in its
    place.
    """
    import torch

    if found.shape != expected.shape:
        return math.inf
    distances: list[torch.Tensor] = []
    sizes: list[torch.Tensor] = []
    for start in range(0, len(found), _BLOCK):
        block = slice(start, start + _BLOCK)
        left, right = (value[block].to("cpu", torch.float32).flatten(1) for value in (found, expected))
        is_odd = ~(left.isfinite() & right.isfinite())
        if not ((left == right) | (left.isnan() & right.isnan()))[is_odd].all():
            return math.inf
        for of, value in ((distances, left - right), (sizes, right)):
            value = value.masked_fill(is_odd, 0.0)
            of.append(torch.linalg.vector_norm(value, dim=1, dtype=torch.float64))
    size = torch.cat(sizes)
    ratio = torch.cat(distances) / size.clamp(min=max(float(size.median()), 1e-30))
    return float(ratio.square().mean().sqrt())


def recomputed(
    model: "HookedModel", tokens: "NDArray[Any]", length: int, hooks: Sequence[str]
) -> "dict[str, torch.Tensor]":
    """The values [length, *shape] of one row alone, without its padding, from the unmodified model.

    The stream comes from ``output_hidden_states``; what enters or leaves a module of Hugging Face, or is a part of
    that, from plain PyTorch hooks. What no module shows (scores, patterns, rotated queries and keys, the inside of
    norms, probabilities of experts) is captured as extraction does it: what then is checked is the order of rows,
    the batching, the padding and the copies, while `actstore.hooks.self_check` has checked the values themselves.

    Args:
        model: it may have been loaded only as far as these hooks need.
        tokens: int32 [context_length].
        length: how many of them are real.
        hooks: canonical names.
    """
    import torch

    used = tokens if _is_length_in_rotation(model.base.config) else tokens[:length]
    ids = torch.from_numpy(used.astype("int64")).to(model.device)[None]
    sites = {hook: _site(model, hook) for hook in hooks}
    plain = {hook: site for hook, site in sites.items() if isinstance(site, Site)}
    values = _plain_forward(model, ids, plain) if plain else {}
    if len(plain) < len(hooks):
        values |= _captured(model, ids, [hook for hook in hooks if hook not in plain])
    return {hook: _as_stored(hook, values[hook][:length], len(tokens)) for hook in hooks}


def _dtype(model: "HookedModel") -> str:
    return str(model.dtype).removeprefix("torch.")


def _is_length_in_rotation(config: Any) -> bool:
    """Whether rotations depend on the length of the row, so that a row without its padding has other values."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return any(
        isinstance(each, dict) and each.get("rope_type") in ("dynamic", "longrope")
        for each in (parameters, *parameters.values())  # of the model, or of each kind of layer
    )


def _site(model: "HookedModel", hook: str) -> AnySite:
    layer, leaf = split(hook)
    sites = (
        sites_outside(model.architecture)
        if layer is None
        else sites_in_layer(model.architecture, model.cfg, layer)
    )
    return sites[leaf]


def _plain_forward(
    model: "HookedModel", ids: "torch.Tensor", sites: Mapping[str, Site]
) -> "dict[str, torch.Tensor]":
    """One forward as transformers offers it; values are [position, *shape]."""
    import torch

    values: dict[str, torch.Tensor] = {}

    def keep(hook: str, value: "torch.Tensor") -> None:
        row = value.reshape(-1, value.shape[-1])  # some modules have no axis for the batch
        values[hook] = sites[hook].part.view(row).clone()  # later modules may write into it

    with (
        exclusive(model.base),
        _unchanged(model.base),
        torch.inference_mode(),
        contextlib.ExitStack() as stack,
    ):
        for hook, site in sites.items():
            layer = split(hook)[0]
            root: nn.Module = model.base if layer is None else model.layers[layer]
            handle = _watch(root.get_submodule(site.module), site.side, hook, keep)
            stack.callback(handle.remove)
        states = model.base(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    n_layers = len(model.layers)
    if states is None or len(states) != n_layers + 1:
        return values  # a family that gives others; the layers themselves have been watched
    for layer in range(n_layers):
        streams = {"hook_resid_pre": states[layer]}
        if layer + 1 < n_layers:  # transformers norms the last
            streams["hook_resid_post"] = states[layer + 1]
        values |= {hook: state[0] for leaf, state in streams.items() if (hook := join(layer, leaf)) in sites}
    return values


@contextlib.contextmanager
def _unchanged(base: "nn.Module") -> Iterator[None]:
    """Take off what a forward hangs on modules: transformers adds hooks of its own, and a note that they are there, to
    a model that is asked for its hidden states, and every later forward would call them.
    """
    before = [(module, set(vars(module)), set(module._forward_hooks)) for module in base.modules()]
    try:
        yield
    finally:
        for module, names, hooks in before:
            for name in vars(module).keys() - names:
                delattr(module, name)
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]


def _watch(
    module: "nn.Module", side: str, hook: str, keep: "Callable[[str, torch.Tensor], None]"
) -> "torch.utils.hooks.RemovableHandle":
    def before(_module: Any, args: Any, kwargs: Any) -> None:
        keep(hook, args[0] if args else kwargs["hidden_states"])

    def after(_module: Any, _args: Any, output: Any) -> None:
        keep(hook, output[0] if isinstance(output, tuple) else output)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _captured(model: "HookedModel", ids: "torch.Tensor", hooks: Sequence[str]) -> "dict[str, torch.Tensor]":
    """What extraction captures of a batch of one row, [position, *shape]."""
    values: dict[str, torch.Tensor] = {}

    def take(hook: str, value: "torch.Tensor") -> None:
        values[hook] = positions_first(hook, value)[0].clone()

    model.run(ids, hooks, take)
    return values


def positions_first(hook: str, value: "torch.Tensor") -> "torch.Tensor":
    """A value as `HookedModel.run` hands it on, as stores have it: [batch, position, *shape]."""
    point = point_of(hook)
    assert point is not None
    return value.movedim(point.position_axis, 1)


def _as_stored(hook: str, value: "torch.Tensor", context_length: int) -> "torch.Tensor":
    """Patterns and scores with all sources of a row of the store: no real position sees its padding."""
    import torch

    point = point_of(hook)
    assert point is not None
    if "source_position" not in point.axes:
        return value
    unseen = -math.inf if point.leaf == "attn.hook_attn_scores" else 0.0
    return torch.nn.functional.pad(value, (0, context_length - value.shape[-1]), value=unseen)

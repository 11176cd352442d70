"""What ablation puts in the place of values: zeros, means, or values of other prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from actstore.errors import HookError, PatchError
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import BY_LEAF
from actstore.hooks.naming.names import join
from actstore.hooks.text.inputs import is_array_of_ids
from actstore.patching.batches import batches
from actstore.patching.clean import check_all_positions
from actstore.patching.engine.cells import PATTERNS

if TYPE_CHECKING:
    import torch

Value = Literal["zero", "mean", "resample"]
"""What is put in."""

New = Callable[[int], "torch.Tensor"]
"""Gives the values that are put in, of a layer: [prompt, position, ...], patterns [prompt, head, position, source]."""


class HasStatistics(Protocol):
    """A store, or anything else that knows means: ``stats(name).mean`` is an array with the shape of one token."""

    def stats(self, hook: Any, /) -> Any: ...


def replacement(
    model: HookedModel,
    tokens: "torch.Tensor",
    leaf: str,
    value: Value,
    source: Any,
    *,
    layers: Sequence[int],
    by_position: bool,
    seed: int,
) -> New:
    """The values that are put in; see `actstore.patching.ablate` for the arguments.

    Raises:
        PatchError: ``value`` is another one, the source does not fit it, or the hook cannot be ablated so.
        HookError: the source does not have the hook.
    """
    if leaf == "attn.hook_attn_scores" and value != "resample":
        raise PatchError(
            f"{value} scores would let positions see later ones; ablate pattern instead of attn_scores, or resample"
        )
    if value == "zero":
        if source is not None:
            raise PatchError("zeros need no source; leave it out, or choose value='mean' or 'resample'")
        return _zeros(model, tokens, leaf, layers)
    names = {layer: join(layer, leaf) for layer in layers}
    return _from_source(model, tokens, leaf, names, value, source, by_position=by_position, seed=seed)


def _from_source(
    model: HookedModel,
    tokens: "torch.Tensor",
    leaf: str,
    names: Mapping[int, str],
    value: Value,
    source: Any,
    *,
    by_position: bool,
    seed: int,
) -> New:
    """Means, or values of other prompts."""
    if value == "mean":
        if leaf in PATTERNS and not by_position:
            raise PatchError(
                "a mean pattern over positions is no pattern; give by_position=True, and prompts of one length"
            )
        return _means(model, tokens, leaf, names, source, by_position)
    if value == "resample":
        return _resampled(model, tokens, leaf, names, source, seed)
    raise PatchError(f"value is {value!r}; choose 'zero', 'mean' or 'resample'")


def _zeros(model: HookedModel, tokens: "torch.Tensor", leaf: str, layers: Sequence[int]) -> New:
    import torch

    names = {layer: join(layer, leaf) for layer in layers}
    _, cache = model.run_with_cache(tokens[:1, :1], names_filter=list(names.values()), return_type=None)

    def new(layer: int) -> "torch.Tensor":
        one = cache[names[layer]]
        n_prompts, length = tokens.shape
        shape = (
            (n_prompts, one.shape[1], length, length) if leaf in PATTERNS else (*tokens.shape, *one.shape[2:])
        )
        return torch.zeros((), dtype=one.dtype, device=one.device).expand(shape)

    return new


def _means(
    model: HookedModel,
    tokens: "torch.Tensor",
    leaf: str,
    names: Mapping[int, str],
    source: Any,
    by_position: bool,
) -> New:
    import torch

    source = tokens if source is None else source
    means: Mapping[int, torch.Tensor]
    if callable(getattr(source, "stats", None)):
        if by_position:
            raise PatchError("statistics have one mean for all positions; leave out by_position")
        means = {layer: torch.as_tensor(source.stats(name).mean) for layer, name in names.items()}
    elif isinstance(source, Mapping):
        check_all_positions(source)
        means = {
            layer: _mean_of(torch.as_tensor(_value(source, name)), leaf, by_position=by_position)
            for layer, name in names.items()
        }
    else:
        means = _means_of_prompts(model, source, names, by_position)
    wrong = [
        mean
        for mean in means.values()
        if by_position and mean.ndim == _n_axes(leaf) and mean.shape[_position(leaf)] != tokens.shape[1]
    ]
    if wrong:
        raise PatchError(
            f"means by position are of {wrong[0].shape[_position(leaf)]} positions, and the prompts have "
            f"{tokens.shape[1]}; give prompts of the same length, or leave out by_position"
        )

    sizes = list(model.cfg.shape(BY_LEAF[leaf], tokens.shape[1]))
    for layer, mean in means.items():
        # Of a token, or of all positions where these are kept apart.
        found = list(mean.shape)
        if by_position:
            del found[_position(leaf)]
        if found != sizes:
            raise PatchError(
                f"the mean of {names[layer]} has shape {list(mean.shape)}, and the value of this model has {sizes} at "
                "a position; the source needs the same model"
            )

    def new(layer: int) -> "torch.Tensor":
        mean = means[layer].to(model.device, model.dtype)
        whole = mean if by_position else mean.expand(tokens.shape[1], *mean.shape)
        return whole.expand(len(tokens), *whole.shape)

    return new


def _mean_of(value: "torch.Tensor", leaf: str, *, by_position: bool) -> "torch.Tensor":
    """The mean of a value of a cache, with or without an axis of prompts; a value that is a mean already is kept."""
    n_more = value.ndim - _n_axes(
        leaf
    )  # 1 with an axis of prompts, 0 with one of positions, -1 for one token
    axes = range(n_more) if by_position else range(n_more + 1)
    return value.double().mean(tuple(axes)) if n_more >= 0 and len(axes) else value


def _means_of_prompts(
    model: HookedModel, prompts: Any, names: Mapping[int, str], by_position: bool
) -> "Mapping[int, torch.Tensor]":
    """Means over prompts, and over positions unless these are kept apart."""
    import torch

    sums: dict[int, torch.Tensor] = {}
    lengths = set()
    count = 0
    for ids in batches(model, prompts):
        lengths.add(ids.shape[1])
        if by_position and len(lengths) > 1:
            raise PatchError(
                f"prompts have {min(lengths)} and {max(lengths)} tokens; means by position need prompts of one length"
            )
        _, cache = model.run_with_cache(ids, names_filter=list(names.values()), return_type=None)
        for layer, name in names.items():
            total = cache[name].double().sum((0,) if by_position else (0, 1))
            sums[layer] = total + sums[layer] if layer in sums else total
        count += len(ids) if by_position else ids.numel()
    return {layer: total / count for layer, total in sums.items()}


def _resampled(
    model: HookedModel,
    tokens: "torch.Tensor",
    leaf: str,
    names: Mapping[int, str],
    source: Any,
    seed: int,
) -> New:
    import torch

    generator = torch.Generator().manual_seed(seed)
    n_prompts, length = tokens.shape
    if callable(getattr(source, "cache", None)):
        raise PatchError(
            "resampling takes sequences of a store as store.cache([0, 1, 2]), since it needs their values"
        )
    if isinstance(source, Mapping):
        check_all_positions(source)
        values = {layer: _value(source, name) for layer, name in names.items()}
        n_rows = len(values[next(iter(names))])
    else:
        prompts = tokens if source is None else torch.as_tensor(source) if is_array_of_ids(source) else source
        rows = prompts if isinstance(prompts, torch.Tensor) else model.to_tokens(prompts)
        if not isinstance(prompts, torch.Tensor):
            _check_one_length(model, prompts)
        _, cache = model.run_with_cache(rows, names_filter=list(names.values()), return_type=None)
        values = {layer: cache[name] for layer, name in names.items()}
        n_rows = len(rows)
    sizes = list(model.cfg.shape(BY_LEAF[leaf], length))
    order = torch.randperm(n_rows, generator=generator)
    if source is None:
        if n_prompts < 2:
            raise PatchError("there is one prompt, and no other to take values from; give a source")
        # Each prompt takes the values of the next one in a random order, so that none keeps its own.
        chosen = torch.empty_like(order)
        chosen[order] = order.roll(-1)
    elif n_rows >= n_prompts:
        chosen = order[:n_prompts]
    else:
        chosen = torch.randint(n_rows, (n_prompts,), generator=generator)

    def new(layer: int) -> "torch.Tensor":
        value = values[layer]
        if value.ndim != _n_axes(leaf) + 1 or value.shape[1 + _position(leaf)] < length:
            raise PatchError(
                f"values of {names[layer]} to resample from have shape {list(value.shape)}, and the prompts have "
                f"{length} positions; give at least as many, with an axis of prompts"
            )
        found = list(value.shape[1:])
        del found[_position(leaf)]
        if leaf in PATTERNS:
            found[-1] = length
        if found != sizes:
            raise PatchError(
                f"values of {names[layer]} to resample from have shape {list(value.shape)}, and those of this model "
                f"have {sizes} at a position; the source needs the same model"
            )
        taken = value[chosen.to(value.device)]
        taken = taken[..., :length, :length] if leaf in PATTERNS else taken[:, :length]
        return taken.to(model.device, model.dtype)

    return new


def _check_one_length(model: HookedModel, prompts: "str | Sequence[str]") -> None:
    texts = [prompts] if isinstance(prompts, str) else prompts
    lengths = {model.to_tokens(text).shape[1] for text in texts}
    if len(lengths) > 1:
        raise PatchError(
            f"prompts to resample from have {min(lengths)} to {max(lengths)} tokens; give prompts of one length"
        )


def _value(values: "Mapping[str, torch.Tensor]", name: str) -> "torch.Tensor":
    try:
        return values[name]
    except HookError:
        raise
    except KeyError:
        raise HookError(f"the source does not hold {name}; run it with that hook") from None


def _position(leaf: str) -> int:
    """Number of the axis of positions of a value of one prompt."""
    return 1 if leaf in PATTERNS else 0


def _n_axes(leaf: str) -> int:
    """Number of axes of a value of one prompt."""
    return len(BY_LEAF[leaf].axes)

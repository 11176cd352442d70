"""The clean side: where the values come from that are put into the corrupted run, and its metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import HookError, PatchError
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import BY_LEAF, Point
from actstore.hooks.naming.names import join
from actstore.patching.engine.metric import Metric, measured
from actstore.patching.prompts import are_prompts, prompt_ids

if TYPE_CHECKING:
    import torch


Clean = "ActivationCache | Mapping[str, torch.Tensor] | torch.Tensor | str | Sequence[str]"
"""A cache, of a live run or of a store (``store.cache(sequences)``); or prompts, as text or ids, which are run once."""


_STREAM: Final = "hook_resid_post"


@dataclass(frozen=True)
class CleanRun:
    """Values of the clean run."""

    values: "Mapping[str, Callable[[int], torch.Tensor]]"
    """For each leaf, the function that gives the values of a layer [prompt, position, ...]."""
    metric: "torch.Tensor | None"
    """Its metric, float64 [1] or [prompt]; None where it is a cache without the last stream."""

    @property
    def number(self) -> "torch.Tensor | None":
        """Its metric as results keep it, float32 [] or [prompt]."""
        return None if self.metric is None else self.metric.float().squeeze()


def clean_run(
    model: HookedModel,
    clean: Any,
    leaves: Mapping[str, Sequence[int]],
    metric: Metric,
    positions: list[int],
    shape: "torch.Size",
) -> CleanRun:
    """Values of several hooks and the metric, from one forward if the clean side is prompts.

    Args:
        model: the model.
        clean: see `Clean`.
        leaves: the layers whose values are needed, by leaf.
        metric: takes logits of ``positions``.
        positions: positions that the metric sees.
        shape: (prompts, positions) of the corrupted prompts.

    Raises:
        HookError: a value is missing.
        PatchError: there are other prompts or positions than the corrupted ones.
    """
    tokens = _prompts_of(model, clean, shape)
    if tokens is not None:
        names = [join(layer, leaf) for leaf, layers in leaves.items() for layer in layers]
        logits, clean = model.run_with_cache(tokens, names_filter=names)
    values = {leaf: _values(model, clean, leaf, layers, shape) for leaf, layers in leaves.items()}
    if tokens is None:
        logits = _cached_logits(model, clean, shape)
    number = None if logits is None else measured(metric, logits[:, positions])
    return CleanRun(values, number)


def _values(
    model: HookedModel, cache: Any, leaf: str, layers: Sequence[int], shape: "torch.Size"
) -> "Callable[[int], torch.Tensor]":
    """The function that gives the values of a layer of a cache, on the device and in the dtype of the model.

    Args:
        model: the model.
        cache: values by name.
        leaf: the hook.
        layers: layers whose values are needed.
        shape: (prompts, positions) of the corrupted prompts.

    Raises:
        HookError: a value is missing.
        PatchError: values have another shape than those of the corrupted prompts, or it is no cache.
    """
    names = {layer: join(layer, leaf) for layer in layers}
    _check_cache(cache)
    point = BY_LEAF[leaf]
    sizes = model.cfg.shape(point, shape[1])
    values = {}
    missing = []
    for layer, name in names.items():
        try:
            value = cache[name]
        except HookError as error:
            missing.append((name, error))
            continue
        except KeyError:
            raise HookError(f"the clean cache does not hold {name}; run it with that hook") from None
        values[layer] = _shaped(value, name, point, sizes, shape).to(model.device, model.dtype)
    if missing:
        if len(missing) == 1:
            raise missing[0][1]
        raise HookError(
            f"the clean cache lacks {len(missing)} of {len(names)} values, the first is {missing[0][0]}; "
            f"run it, or extract, with names_filter='blocks.*.{leaf}'"
        )
    return values.__getitem__


def _check_cache(clean: Any) -> None:
    if callable(getattr(clean, "cache", None)):
        raise PatchError(
            "the clean side is a whole store; give those of its sequences that stand against the corrupted prompts, as "
            "in store.cache([7])"
        )
    if not isinstance(clean, Mapping):
        raise PatchError(
            f"the clean side is {quoted(clean)}; give prompts as text or token ids, or a cache, of run_with_cache or "
            "of a store"
        )
    check_all_positions(clean)


def check_all_positions(cache: Any) -> None:
    """Check that a cache has all positions of its prompts.

    Raises:
        PatchError: it is of a store of chosen positions.
    """
    if getattr(cache, "positions", None) is not None:
        raise PatchError(
            "the cache is of a store of chosen positions, and patching needs all positions of a prompt; extract them "
            "without --positions, or give the prompts"
        )


def _prompts_of(model: HookedModel, clean: Any, shape: "torch.Size") -> "torch.Tensor | None":
    """The clean prompts as ids [prompt, position]; None if the clean side is a cache.

    Args:
        model: the model, whose tokenizer reads text.
        clean: see `Clean`.
        shape: (prompts, positions) of the corrupted prompts.

    Raises:
        PatchError: there are other prompts or positions than the corrupted ones.
    """
    if not are_prompts(clean):
        return None
    tokens = prompt_ids(model, clean, "clean")
    check_lengths(tokens.shape, shape)
    return tokens


def _cached_logits(model: HookedModel, cache: Any, shape: "torch.Size") -> "torch.Tensor | None":
    """Logits of a clean cache [prompt, position, d_vocab]; None if it lacks the stream out of the last layer.

    Args:
        model: the model.
        cache: values by name.
        shape: (prompts, positions) of the corrupted prompts.
    """
    name = join(model.cfg.n_layers - 1, _STREAM)
    if name not in cache:
        return None
    point = BY_LEAF[_STREAM]
    stream = _shaped(cache[name], name, point, model.cfg.shape(point, shape[1]), shape)
    logits: torch.Tensor = model(stream.to(model.device, model.dtype), start_at_layer=model.cfg.n_layers)
    return logits


def check_lengths(clean: "torch.Size", corrupted: "torch.Size") -> None:
    """Check that prompts line up.

    Raises:
        PatchError: they do not.
    """
    if tuple(clean) != tuple(corrupted):
        raise PatchError(
            f"the clean prompts are {clean[0]} of {clean[1]} tokens, and the corrupted ones {corrupted[0]} of "
            f"{corrupted[1]}; choose prompts with as many tokens, so that positions mean the same"
        )


def _shaped(
    value: "torch.Tensor", name: str, point: Point, sizes: tuple[int, ...], shape: "torch.Size"
) -> "torch.Tensor":
    """A value [prompt, position, ...] with its axis of prompts, which a cache of one prompt may lack.

    Args:
        value: the value of a cache.
        name: its hook.
        point: what the hook is.
        sizes: shape of the value at one position.
        shape: (prompts, positions) of the corrupted prompts.
    """
    whole = list(sizes)
    whole.insert(point.position_axis - 1, shape[1])
    if list(value.shape) == [shape[0], *whole]:
        return value
    if shape[0] == 1 and list(value.shape) == whole:
        return value[None]
    raise PatchError(
        f"clean values of {name} have shape {list(value.shape)}, and those of the corrupted prompts, {shape[0]} of "
        f"{shape[1]} tokens, have {[shape[0], *whole]}; the clean run needs this model, and as many prompts and tokens"
    )

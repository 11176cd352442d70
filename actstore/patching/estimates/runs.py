"""The two runs behind an estimate: values of the clean one, values and gradients of the corrupted one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.errors import PatchError
from actstore.hooks.capture.hook_point import HookFunction
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.patching.clean import clean_values, prompts_of
from actstore.patching.engine.metric import Metric, measured

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CleanRun:
    """Values of the clean run."""

    values: "Mapping[str, Callable[[int], torch.Tensor]]"
    """For each leaf, the function that gives the values of a layer [prompt, position, ...]."""
    metric: "torch.Tensor | None"
    """Its metric, float64 [1] or [prompt]; None where the clean side is a cache."""


def clean_run(
    model: HookedModel,
    clean: Any,
    leaves: Mapping[str, Sequence[int]],
    metric: Metric,
    positions: list[int],
    shape: "torch.Size",
) -> CleanRun:
    """Values of several hooks, in one forward if the clean side is prompts.

    Args:
        model: the model.
        clean: see `actstore.patching.clean.Clean`.
        leaves: the layers whose values are needed, by leaf.
        metric: takes logits of ``positions``.
        positions: positions that the metric sees.
        shape: (prompts, positions) of the corrupted prompts.

    Raises:
        HookError: a value is missing.
        PatchError: there are other prompts or positions than the corrupted ones.
    """
    tokens = prompts_of(model, clean, shape)
    number = None
    if tokens is not None:
        names = [join(layer, leaf) for leaf, layers in leaves.items() for layer in layers]
        logits, clean = model.run_with_cache(tokens, names_filter=names)
        number = measured(metric, logits[:, positions])
    values = {leaf: clean_values(model, clean, leaf, layers, shape) for leaf, layers in leaves.items()}
    return CleanRun(values, number)


@dataclass(frozen=True)
class CorruptedRun:
    """Values of the corrupted run, and what the metric gains by a step of each of them."""

    values: "Mapping[str, torch.Tensor]"
    """Values by name, without their graph."""
    gradients: "Mapping[str, torch.Tensor]"
    """Gradients of the metric, or the coefficients that rules put in their place, by name. If the metric gives a number
    for each prompt, a row has those of the number of its prompt.
    """
    metric: "torch.Tensor"
    """Metric, float64 [1] or [prompt]."""


def corrupted_run(
    model: HookedModel,
    tokens: "torch.Tensor",
    names: Iterable[str],
    metric: Metric,
    positions: list[int],
    rules: Sequence[tuple[str, HookFunction]] = (),
) -> CorruptedRun:
    """Run the corrupted prompts once, forwards and backwards.

    Args:
        model: the model.
        tokens: ids [prompt, position].
        names: canonical names of the hooks.
        metric: takes logits of ``positions`` and gives one number, or one for each prompt that depends on it alone.
        positions: positions that the metric sees.
        rules: functions on hooks that change gradients and no values.

    Raises:
        PatchError: the metric gives something else than numbers, or numbers without a gradient.
    """
    import torch

    names = list(dict.fromkeys(names))
    with model.hooks(rules):
        logits, cache = model.run_with_cache(tokens, names_filter=names, grad=True)
    with torch.enable_grad():
        result = metric(logits[:, positions])
    numbers = measured(lambda _logits: result, logits)
    if not isinstance(result, torch.Tensor) or not result.requires_grad:
        kind = "a tensor without a gradient" if isinstance(result, torch.Tensor) else type(result).__name__
        raise PatchError(
            f"an estimate needs the gradient of the metric, and the metric gave {kind}; compute it from the logits by "
            "operations of torch, without float(), item() or detach()"
        )
    values = [cache[name] for name in names]
    gradients = torch.autograd.grad(result.sum(), values, allow_unused=True)
    return CorruptedRun(
        {name: value.detach() for name, value in zip(names, values, strict=True)},
        {
            name: torch.zeros_like(value) if gradient is None else gradient
            for name, value, gradient in zip(names, values, gradients, strict=True)
        },
        numbers,
    )

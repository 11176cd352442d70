"""The run behind an estimate: values and gradients of the corrupted prompts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.errors import PatchError
from actstore.hooks.capture.hook_point import HookFunction
from actstore.hooks.model import HookedModel
from actstore.patching.engine.metric import Metric, measured

if TYPE_CHECKING:
    import torch


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
    results = []

    def kept(logits: "torch.Tensor") -> Any:
        results.append(metric(logits))
        return results[0]

    with torch.enable_grad():
        numbers = measured(kept if callable(metric) else metric, logits[:, positions])
    result = results[0]
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

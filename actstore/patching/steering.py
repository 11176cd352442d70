"""Steering: adding a direction to what a hook says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from actstore.errors import PatchError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import HookName
from actstore.patching.batches import batches
from actstore.patching.engine.metric import positions_of

if TYPE_CHECKING:
    import torch


def steering(
    vector: "torch.Tensor",
    hook: HookName | int,
    coefficient: float = 1.0,
    positions: "int | Sequence[int] | slice | None" = None,
) -> "tuple[HookName, Steering]":
    """A pair for ``fwd_hooks``: a hook, and a function that adds a multiple of a direction to its value.

    ``model.run_with_hooks(tokens, fwd_hooks=[steering(vector, 12, 4.0)])`` runs with it once. With gradients, they
    flow back to the direction, too.

    Args:
        vector: the direction, with the axes of the value of the hook behind positions: [d_model] for the stream,
            [head, d_head] or [d_head] for z.
        hook: name of the hook, in any spelling; a number means the stream out of that layer.
        coefficient: what the direction is multiplied by.
        positions: positions of the value at which it is added; None for all of them.

    Raises:
        PatchError: when the function runs, the value has other axes, or lacks a position.
    """
    return _named(hook), Steering(vector, coefficient, positions)


@dataclass(frozen=True)
class Steering:
    """The function on the hook; see `steering`."""

    vector: "torch.Tensor"
    coefficient: float = 1.0
    positions: "int | Sequence[int] | slice | None" = None

    def __call__(self, value: "torch.Tensor", /, *, hook: HookPoint) -> "torch.Tensor":
        """The value with the direction added, as a new tensor."""
        vector = self.vector.to(value)
        n_axes = vector.ndim
        if n_axes == 0 or n_axes > value.ndim - 2 or value.shape[-n_axes:] != vector.shape:
            raise PatchError(
                f"the direction has shape {list(vector.shape)}, and {hook.name} has {list(value.shape[2:])} at a "
                "position; give a direction of that hook"
            )
        step = vector * self.coefficient
        if self.positions is None:
            return value + step
        chosen: slice | list[int]
        if isinstance(self.positions, slice):
            chosen = self.positions
        else:
            chosen = sorted(set(positions_of(self.positions, value.shape[1])))
        steered = value.clone()
        steered[:, chosen] = value[:, chosen] + step
        return steered


def steering_vector(
    model: HookedModel,
    positive: "torch.Tensor | str | Sequence[str]",
    negative: "torch.Tensor | str | Sequence[str]",
    hook: HookName | int,
    *,
    position: "int | Literal['mean']" = -1,
    max_tokens: int | None = None,
) -> "torch.Tensor":
    """The direction from one kind of prompts to another: the difference of the means of a hook.

    Args:
        model: the model.
        positive: prompts, as ids [prompt, position] or text, whose lengths may differ.
        negative: prompts of the other kind; there may be another number of them.
        hook: name of the hook, in any spelling; a number means the stream out of that layer.
        position: the position of each prompt whose value counts, -1 for its last token; or ``mean`` for the mean of
            all its positions.
        max_tokens: tokens of one forward, at least one prompt; None for 4,096.

    Returns:
        The mean over the positive prompts minus that over the negative ones, with the axes of the value behind
        positions, on the device and in the dtype of the model.

    Raises:
        HookError: the model does not have the hook.
        PatchError: there is no token, a prompt lacks the position, or the hook has no value for a position.
    """
    name = model.names.one(_named(hook))
    means = [_mean(model, prompts, name, position, max_tokens) for prompts in (positive, negative)]
    return (means[0] - means[1]).to(model.dtype)


def _mean(
    model: HookedModel,
    prompts: "torch.Tensor | str | Sequence[str]",
    name: str,
    position: "int | Literal['mean']",
    max_tokens: int | None,
) -> "torch.Tensor":
    """The mean over prompts in float64."""
    sums = []
    n_prompts = 0
    for ids in batches(model, prompts, max_tokens):
        if position != "mean" and not -ids.shape[1] <= position < ids.shape[1]:
            raise PatchError(f"position is {position}, and a prompt has {ids.shape[1]} tokens")
        _, cache = model.run_with_cache(ids, names_filter=name, return_type=None)
        value = cache[name].double()
        if value.shape[:2] != ids.shape:
            raise PatchError(f"{name} has no value for a position by itself; choose another hook")
        sums.append((value.mean(1) if position == "mean" else value[:, position]).sum(0))
        n_prompts += len(ids)
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    return total / n_prompts


def _named(hook: HookName | int) -> HookName:
    return ("resid_post", hook) if isinstance(hook, int) else hook

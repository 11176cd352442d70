"""Calling the metric of a user on the logits of cells."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from actstore.errors import PatchError
from actstore.hooks.capture.exclusive import in_function

if TYPE_CHECKING:
    import torch

Metric = Callable[["torch.Tensor"], Any]
"""Takes logits [prompt, position, d_vocab] and gives one number, or one for each prompt [prompt]."""


def measured(metric: Metric, logits: "torch.Tensor", *, is_in_turn: bool = False) -> "torch.Tensor":
    """The numbers of a metric, float64 [1] or [prompt].

    Args:
        metric: the function of the user.
        logits: [prompt, position, d_vocab].
        is_in_turn: whether a forward of the model is running, so that the metric cannot run the model.

    Raises:
        PatchError: it does not give one number, or one for each prompt.
    """
    import torch

    if is_in_turn:
        with in_function():
            result = metric(logits)
    else:
        result = metric(logits)
    numbers = torch.as_tensor(result).detach().to("cpu", torch.float64)
    if numbers.numel() != 1 and numbers.shape != (len(logits),):
        raise PatchError(
            f"the metric gave shape {list(numbers.shape)} for logits {list(logits.shape)}; return one number, or one "
            f"for each of the {len(logits)} prompts"
        )
    return numbers.reshape(-1)


def positions_of(positions: "int | Sequence[int] | None", length: int) -> list[int]:
    """The positions whose logits a metric is given, from 0 on.

    Raises:
        PatchError: a position is not in the prompts.
    """
    if positions is None:
        return list(range(length))
    chosen = [positions] if isinstance(positions, int) else list(positions)
    wrong = [position for position in chosen if not -length <= position < length]
    if wrong or not chosen:
        raise PatchError(
            f"positions holds {wrong[0] if wrong else 'nothing'}; the prompts have positions 0 to {length - 1}"
        )
    return [position % length for position in chosen]

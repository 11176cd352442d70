"""Calling the metric of a user on the logits of cells."""

from collections.abc import Callable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

from actstore.errors import PatchError
from actstore.hooks.capture.exclusive import in_function
from actstore.hooks.messages.quoted import quoted

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
        PatchError: it is no function, or does not give one number, or one for each prompt.
    """
    import torch

    if not callable(metric):
        raise PatchError(
            f"the metric is {quoted(metric)}; give a function of logits [prompt, position, d_vocab]"
        )
    if is_in_turn:
        with in_function():
            result = metric(logits)
    else:
        result = metric(logits)
    try:
        numbers = torch.as_tensor(result).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        numbers = None
    if numbers is None or numbers.is_complex():
        found = type(result).__name__ if numbers is None else "complex numbers"
        raise PatchError(
            f"the metric gave {found}; return one number, or one for each of the {len(logits)} prompts"
        )
    if numbers.numel() != 1 and numbers.shape != (len(logits),):
        raise PatchError(
            f"the metric gave shape {list(numbers.shape)} for logits {list(logits.shape)}; return one number, or one "
            f"for each of the {len(logits)} prompts"
        )
    return numbers.to(torch.float64).reshape(-1)


def positions_of(positions: "int | Sequence[int] | None", length: int) -> list[int]:
    """The positions whose logits a metric is given, from 0 on.

    Raises:
        PatchError: a position is not in the prompts, or no whole number.
    """
    if positions is None:
        return list(range(length))
    given: Any = positions.tolist() if hasattr(positions, "tolist") else positions
    chosen = [given] if isinstance(given, int) else list(given) if isinstance(given, Sequence) else [given]
    strange = [position for position in chosen if not isinstance(position, SupportsIndex)]
    if strange:
        raise PatchError(
            f"positions holds {strange[0]!r}; give whole numbers, such as -1 for the last position"
        )
    chosen = [index(position) for position in chosen]
    wrong = [position for position in chosen if not -length <= position < length]
    if wrong or not chosen:
        raise PatchError(
            f"positions holds {wrong[0] if wrong else 'nothing'}; the prompts have positions 0 to {length - 1}"
        )
    return [position % length for position in chosen]

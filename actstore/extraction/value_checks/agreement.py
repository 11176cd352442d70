"""How far two computations of one row may differ: as far as the shape of the batch changes it, and no further."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

_SMALLEST: Final = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Error of a position that is always allowed, by dtype, even where both batches give the same bits. Sums in another
order, as in other kernels, move a position of SmolLM2 by 4e-6 in float32 and by 0.046 in bfloat16.
"""
_LARGEST: Final = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest error of a position that can be rounding, by dtype. Neighbouring layers of SmolLM2 are 0.2 apart."""
_SHARE_OF_SCALES: Final = 0.2
"""Share of these errors that is allowed for scales: rounding moves them by a quarter of what it moves vectors by."""
_STEPS_OF_SCALES: Final = 2.0
"""Error that is allowed for a scale, a single number, in steps of its dtype."""
_TIMES_ROUNDING: Final = 3.0
_USUAL: Final = 0.9
"""Share of positions whose rounding counts as usual. In a mixture, rounding may send others to other experts."""
_BLOCK: Final = 256
"""Number of positions compared at once, since patterns of a long row are large."""


@dataclass(frozen=True)
class Deviation:
    """The position of a row with the largest error."""

    position: int
    error: float
    """Norm of the difference over that of the right value; infinite if only one of them is finite."""
    allowed: float


def deviation(
    hook: str,
    values: "torch.Tensor",
    in_batch: "torch.Tensor",
    alone: "torch.Tensor",
    *,
    dtype: str,
    is_mixture: bool,
    is_other_machine: bool = False,
) -> Deviation | None:
    """The position where a row is wrong; None if every position is right.

    Kernels choose their order of summation by the shape of the batch, so the same row has other last bits in another
    batch. Two plain forwards show how large that rounding is: one of the batch of the row, one of the row alone. A
    position is right if it is no further from one of them than three times what usually lies between them.

    Args:
        hook: canonical name.
        values: values of the row that are checked, [position, *shape].
        in_batch: the row from a plain forward of its batch.
        alone: the row from a plain forward of nothing else.
        dtype: of the model.
        is_mixture: whether the model sends positions to experts. Rounding can send one to another, and then that
            position differs as a whole between the two forwards.
        is_other_machine: whether other kernels than those of the two forwards computed the row, on other hardware or
            in another version. Then any error is allowed that can be rounding.
    """
    smallest, largest = _limits(hook, dtype)
    rounding = distances(in_batch, alone)
    # Near overflow, one of the two may be infinite; the value must still equal one of them.
    rounding = rounding.where(rounding.isfinite(), 0.0)
    usual = float(rounding.quantile(_USUAL, interpolation="higher"))
    allowed = largest if is_other_machine else min(max(_TIMES_ROUNDING * usual, smallest), largest)
    errors = distances(values, in_batch).minimum(distances(values, alone))
    worst = int(errors.argmax())
    if not errors[worst] <= allowed:
        return Deviation(worst, float(errors[worst]), allowed)
    # The two plain forwards must agree as well, or the check shows nothing: hooks could be in the wrong place.
    apart = usual if is_mixture else float(rounding.max())
    if not apart <= largest:
        return Deviation(int(rounding.argmax()), apart, largest)
    return None


def is_close(hook: str, values: "torch.Tensor", expected: "torch.Tensor", *, dtype: str) -> bool:
    """Whether every position of a row, both [position, ...], has an error that is always allowed."""
    smallest, _ = _limits(hook, dtype)
    return bool((distances(values, expected) <= smallest).all())


def _limits(hook: str, dtype: str) -> tuple[float, float]:
    """(error that is always allowed, largest error that can be rounding) for a position."""
    import torch

    if not hook.endswith("hook_scale"):
        return _SMALLEST[dtype], _LARGEST[dtype]
    steps = _STEPS_OF_SCALES * torch.finfo(getattr(torch, dtype)).eps
    smallest = max(_SMALLEST[dtype] * _SHARE_OF_SCALES, steps)
    return smallest, max(_LARGEST[dtype] * _SHARE_OF_SCALES, 2 * steps)


def share_apart(hook: str, values: "torch.Tensor", expected: "torch.Tensor", *, dtype: str) -> float:
    """Share of the positions of a row, both [position, ...], that differ by more than rounding."""
    _, largest = _limits(hook, dtype)
    return float((~(distances(values, expected) <= largest)).double().mean())


def distances(values: "torch.Tensor", expected: "torch.Tensor") -> "torch.Tensor":
    """How far ``values`` are from ``expected``, both [position, ...]: float64 [position], about 1 for unrelated ones.

    For each position ``||values - expected|| / max(||expected||, m)``, where m is the median of ``||expected||`` over
    positions, so that the error of a position with small values is not its rounding alone. Norms of other positions
    are no measure: the stream of a trained model is very large at some (https://arxiv.org/abs/2402.17762).

    The distance is infinite where one value is not finite, such as the score of a masked position, and the other is not
    the same.
    """
    import torch

    if values.shape != expected.shape:
        return torch.full((len(expected),), math.inf, dtype=torch.float64)
    differences: list[torch.Tensor] = []
    sizes: list[torch.Tensor] = []
    for start in range(0, len(values), _BLOCK):
        block = slice(start, start + _BLOCK)
        left, right = (value[block].to("cpu", torch.float32).flatten(1) for value in (values, expected))
        is_odd = ~(left.isfinite() & right.isfinite())
        is_other = is_odd & ~((left == right) | (left.isnan() & right.isnan()))
        left, right = left.masked_fill(is_odd, 0.0), right.masked_fill(is_odd, 0.0)
        difference = torch.linalg.vector_norm(left - right, dim=1, dtype=torch.float64)
        differences.append(difference.masked_fill(is_other.any(1), math.inf))
        sizes.append(torch.linalg.vector_norm(right, dim=1, dtype=torch.float64))
    size = torch.cat(sizes)
    return torch.cat(differences) / size.clamp(min=max(float(size.median()), 1e-30))


def relative_error(values: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The root mean square of `distances` over the positions."""
    return float(distances(values, expected).square().mean().sqrt())


def is_mixture(config: Any) -> bool:
    """Whether a model of this configuration, or a part of it, sends positions to experts."""
    return any(
        ("experts" in field and isinstance(value, int) and value > 1)
        or (hasattr(value, "to_dict") and is_mixture(value))
        for field, value in vars(config).items()
    )

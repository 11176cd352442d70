"""What a patching experiment gives: numbers with their axes, and what is needed to judge them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Axis:
    """An axis of a grid."""

    name: str
    """``layer``, ``pos``, ``head``, ``src_pos``, ... or ``prompt``."""
    labels: tuple[str, ...]
    """What each index is called, such as ``5: ' Tower'``."""


@dataclass(frozen=True)
class PatchResult:
    """The metric of every cell of a grid."""

    values: "torch.Tensor"
    """Metric of the patched run, float32 [axis, ...] in the order of ``axes``."""
    axes: tuple[Axis, ...]
    hook: str
    """The hook whose values were replaced, such as ``resid_pre``."""
    model_name: str
    corrupted: "torch.Tensor"
    """Metric of the corrupted run: one number, or one for each prompt."""
    clean: "torch.Tensor | None"
    """Metric of the clean run; None where its logits are not known."""
    engine: str
    """``packed rows``; or ``whole rows`` and why."""
    noise_floor: float
    """Largest difference of the unpatched metric between the shapes of batches used. Smaller effects mean nothing."""
    n_skipped: int
    """Cells that change nothing, and so have exactly the metric of the corrupted run."""
    seconds: float

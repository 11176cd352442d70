"""What an estimate gives: a `PatchResult` that says which of its cells are exact, and how good the others are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.patching.results.panels import Panels, panels_of
from actstore.patching.results.result import PatchResult

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, repr=False)
class Estimate(PatchResult):
    """The estimated metric of every cell of a grid, exact where it was refined."""

    method: str
    """``atp`` or ``relp``."""
    estimate: "torch.Tensor"
    """The estimate of every cell, shaped like ``values``, which differs where ``is_exact``."""
    is_exact: "torch.Tensor"
    """Whether a cell was computed, bool, shaped like ``values``."""
    n_sampled: int
    """Cells that were drawn at random to judge the estimate."""
    correlation: float | None
    """Pearson correlation of estimated and exact differences over the cells drawn; None if it is not defined."""
    recall: float | None
    """The share of the cells drawn with the largest tenth of exact differences that are also in the tenth with the
    largest estimates; None if no cells were drawn.
    """

    def __repr__(self) -> str:
        shape = " x ".join(f"{len(axis.labels)} {axis.name}" for axis in self.axes)
        judged = (
            ""
            if self.recall is None
            else f", on {self.n_sampled} drawn cells recall {self.recall:.2f}"
            + ("" if self.correlation is None else f" and correlation {self.correlation:.2f}")
        )
        return (
            f"<Estimate ({self.method}) {self.hook} of {self.model_name}: {shape}, {int(self.is_exact.sum())} exact"
            f"{judged}, {self.seconds:.2f} s>"
        )

    @property
    def _own_columns(self) -> "Mapping[str, torch.Tensor]":
        return {"estimate": self.estimate, "is_exact": self.is_exact}

    def _panels(self) -> Panels:
        if self.axes[-1].name != "neuron":
            return super()._panels()
        # Thousands of columns show nothing; to first order, neurons that are patched together add up.
        is_share = self._has_effect
        return panels_of(
            (self.effect if is_share else self.difference).sum(-1),
            self.axes[:-1],
            title=f"{self.hook} of {self.model_name}, sum over neurons",
            unit="share of the way to the clean run" if is_share else "change of the metric",
        )

"""What is added up over the rows of a scan for some SAEs at once. Each row is encoded once by each of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.sae_evaluation.autoencoder import EvaluatedSae
from actstore.analysis.sae_evaluation.held_out import HeldOut
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays

if TYPE_CHECKING:
    import torch

_FEATURES_AT_ONCE: Final = 1 << 22
"""Features of all rows that are encoded together: 16 MiB, which bounds the memory of wide SAEs, and is enough for fast
matrix products. How rows are divided decides the last bits, so it depends on the width of the SAE alone.
"""
ERROR, SHARE, BIAS_ABOVE, BIAS_BELOW, COSINE, RATIO, L1 = range(7)
"""Columns of `EvaluationState.sums`: squared error; squared error as a share of the squared distance from the mean;
squared norm of what is rebuilt, and its product with the row; cosine; ratio of norms; sum of absolute features.
"""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Reduction to the sums of some SAEs."""

    hook: str
    saes: tuple[EvaluatedSae, ...]
    held_out: HeldOut | None = None
    """Only these rows are taken; None for all."""

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook,)

    def identity(self) -> str:
        rows = None if self.held_out is None else self.held_out.identity()
        return f"sae evaluation {self.hook} {rows} {[sae.identity() for sae in self.saes]}"

    def start(self) -> "EvaluationState":
        return EvaluationState(self)

    def restore(self, arrays: Arrays) -> "EvaluationState":
        """See `Reduction.restore`."""
        state = EvaluationState(self)
        for name, mine in state.arrays().items():
            given = np.asarray(arrays[name])
            if given.shape != mine.shape or given.dtype != mine.dtype:
                raise ValueError("the state has another shape")
            mine[...] = given
        return state

    def finish(self, state: "EvaluationState") -> "EvaluationState":
        """The state, which is the result."""
        return state


class EvaluationState:
    """Sums over the rows so far."""

    def __init__(self, of: Evaluation) -> None:
        self._of = of
        size = int(np.prod(of.saes[0].shape))
        self.counts = np.zeros(2, np.int64)
        """Rows, and those of them that differ from the mean of their block."""
        self.sum = np.zeros(size)
        """Sum of the rows, [d]."""
        self.squares = np.zeros(1)
        """Sum of all squared elements."""
        self.sums = np.zeros((len(of.saes), 7))
        """[n_saes, columns]."""
        self.active = [np.zeros(sae.d_sae, np.int64) for sae in of.saes]
        """Number of rows in which each feature is not 0, [d_sae] of each SAE."""

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        import torch

        values = block.values(self._of.hook)
        if self._of.held_out is not None:
            taken = self._of.held_out(block.documents, block.addresses)
            if not taken.any():
                return
            if not taken.all():
                values = values[torch.from_numpy(np.flatnonzero(taken))]
        rows = values.flatten(1).float()
        total = rows.sum(0, dtype=torch.float64)
        squared = rows.square().sum(1, dtype=torch.float64)
        # As SAELens takes the mean of a batch. A row that is the mean has no distance to divide by.
        distances = (rows - (total / len(rows)).float()).square().sum(1)
        is_apart = distances > 0
        self.counts += np.array([len(rows), int(is_apart.sum())])
        self.sum += total.numpy()
        self.squares += float(squared.sum())
        inverse = torch.where(is_apart, 1 / distances, 0.0)
        norms = squared.sqrt().float()
        for number, sae in enumerate(self._of.saes):
            step = max(1, _FEATURES_AT_ONCE // sae.d_sae)
            for first in range(0, len(rows), step):
                span = slice(first, first + step)
                features, rebuilt = sae(values[span])
                self._add(number, features, rebuilt, rows[span], inverse[span], norms[span])

    def _add(
        self,
        number: int,
        features: "torch.Tensor",
        rebuilt: "torch.Tensor",
        rows: "torch.Tensor",
        inverse: "torch.Tensor",
        norms: "torch.Tensor",
    ) -> None:
        """Add some rows of one SAE; ``inverse`` are inverse squared distances from the mean."""
        import torch

        is_active = features != 0
        self.active[number] += is_active.sum(0).cpu().numpy()
        rebuilt = rebuilt.to(rows.device, torch.float32)
        errors = (rows - rebuilt).square().sum(1)
        products = (rows * rebuilt).sum(1)
        rebuilt_norms = rebuilt.norm(dim=1)
        by_row = {
            ERROR: errors,
            SHARE: errors * inverse,
            BIAS_ABOVE: rebuilt_norms.square(),
            BIAS_BELOW: products,
            COSINE: products / (norms * rebuilt_norms),
            # As in SAELens, a row of almost no length counts as one of length 1.
            RATIO: rebuilt_norms / torch.where(norms < 1e-4, 1.0, norms),
            L1: features.float().norm(p=1, dim=1),
        }
        for column, figures in by_row.items():
            self.sums[number, column] += float(figures.sum(dtype=torch.float64))

    def merge(self, other: Self) -> None:
        """Take the sums of rows that follow."""
        for mine, theirs in zip(self.arrays().values(), other.arrays().values(), strict=True):
            mine += theirs

    def arrays(self) -> Arrays:
        """All that is known."""
        named: dict[str, NDArray[np.generic]] = {
            "counts": self.counts,
            "sum": self.sum,
            "squares": self.squares,
            "sums": self.sums,
        }
        return named | {f"active{number}": active for number, active in enumerate(self.active)}

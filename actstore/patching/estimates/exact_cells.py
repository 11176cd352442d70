"""Cells of an estimate that are computed: those with the largest estimates, and some at random to judge it by."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from actstore.patching.engine.cells import Cells

if TYPE_CHECKING:
    import torch

_TOP: Final = 0.1
"""Share of the sampled cells that recall is about."""


@dataclass(frozen=True)
class Chosen:
    """Numbers of cells, ascending: of those to compute, and which of them were drawn at random."""

    cells: "torch.Tensor"
    """[chosen]"""
    is_drawn: "torch.Tensor"
    """[chosen]"""


def chosen_cells(
    sizes: "torch.Tensor", can_change: "torch.Tensor", refine: int, sample: int, seed: int
) -> Chosen:
    """Choose cells.

    Args:
        sizes: size of the estimated effect of each cell [cell].
        can_change: whether a cell replaces a value by another one [cell]; others have the effect 0, and tell nothing.
        refine: how many of the largest to compute.
        sample: how many of those that can change anything to draw without replacement.
        seed: seed of the draw.
    """
    import torch

    largest = sizes.argsort(descending=True, stable=True)[:refine]
    candidates = can_change.nonzero()[:, 0]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    drawn = candidates[order[:sample]]
    is_chosen = torch.zeros(len(sizes), dtype=torch.bool)
    is_chosen[largest] = is_chosen[drawn] = True
    cells = is_chosen.nonzero()[:, 0]
    return Chosen(cells, torch.isin(cells, drawn))


def subset(cells: Cells, chosen: "torch.Tensor") -> Cells:
    """Some of the cells, by their numbers in ascending order."""
    return replace(
        cells,
        layers=cells.layers[chosen],
        starts=cells.starts[chosen],
        stops=cells.stops[chosen],
        heads=None if cells.heads is None else cells.heads[chosen],
        sources=None if cells.sources is None else cells.sources[chosen],
    )


def correlation(estimated: "torch.Tensor", exact: "torch.Tensor") -> float | None:
    """Pearson correlation of two lists of numbers; None if one of them does not vary."""
    import torch

    pair = torch.stack([estimated.flatten().double(), exact.flatten().double()])
    if pair.shape[1] < 2 or not bool((pair.std(1) > 0).all()):
        return None
    return float(torch.corrcoef(pair)[0, 1])


def recall(estimated: "torch.Tensor", exact: "torch.Tensor") -> float:
    """Share of the tenth of cells with the largest exact effects that is in the tenth with the largest estimates.

    Args:
        estimated: size of the estimated effect of each cell [cell].
        exact: size of the exact effect [cell].
    """
    n_top = max(1, round(_TOP * len(exact)))
    top = [set(sizes.argsort(descending=True, stable=True)[:n_top].tolist()) for sizes in (estimated, exact)]
    return len(top[0] & top[1]) / n_top

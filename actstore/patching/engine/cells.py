"""Cells of a grid: which value each of them replaces, and by what."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from actstore.hooks.naming.hook_points import POINTS

if TYPE_CHECKING:
    import torch

PATTERNS: Final = tuple(point.leaf for point in POINTS if "source_position" in point.axes)
"""Leaves with values [prompt, head, position, source_position]."""
_BOOLEANS_AT_ONCE: Final = 1 << 24


@dataclass(frozen=True)
class Cells:
    """Cells that replace values of one hook, each in one layer."""

    leaf: str
    """The hook, such as ``attn.hook_z``."""
    layers: "torch.Tensor"
    """The layer of each cell [cell], ascending."""
    starts: "torch.Tensor"
    """The first position whose value each cell replaces [cell]."""
    stops: "torch.Tensor"
    """The position behind the last one [cell]."""
    heads: "torch.Tensor | None"
    """The head, or neuron, whose value each cell replaces [cell]; None for the values of all of them."""
    sources: "torch.Tensor | None"
    """For patterns, the source position that each cell replaces [cell]; None for all."""
    new: Callable[[int], "torch.Tensor"]
    """Gives the values that are put in, of a layer: [prompt, position, ...], patterns [prompt, head, position,
    source_position]. There is one prompt for each corrupted prompt.
    """

    def __len__(self) -> int:
        return len(self.layers)


def trimmed(
    cells: Cells, recorded: "Callable[[int], torch.Tensor]", n_prompts: int
) -> "tuple[Cells, torch.Tensor]":
    """Leave out what a cell replaces by the same value, which changes nothing.

    Args:
        cells: the cells.
        recorded: gives the values of the corrupted run, of a layer, shaped like those of ``cells.new``.
        n_prompts: number of prompts.

    Returns:
        (cells that start at the first position that they change, whether a cell changes a prompt [cell, prompt]).
    """
    import torch

    changed = torch.zeros(len(cells), n_prompts, dtype=torch.bool)
    starts = cells.starts.clone()
    for layer in sorted(set(cells.layers.tolist())):
        values_differ = (cells.new(layer) != recorded(layer)).cpu()
        n_at_once = max(1, _BOOLEANS_AT_ONCE // values_differ[..., 0].numel())
        for numbers in (cells.layers == layer).nonzero()[:, 0].split(n_at_once):
            differs = _by_position(cells, numbers, values_differ)  # [cell, prompt, position]
            positions = torch.arange(differs.shape[2])
            is_edited = (cells.starts[numbers][:, None] <= positions) & (
                positions < cells.stops[numbers][:, None]
            )
            differs = differs & is_edited[:, None]
            changed[numbers] = differs.any(2)
            # argmax of booleans gives the first True; cells that change nothing keep their start.
            first = differs.any(1).int().argmax(1)
            starts[numbers] = torch.where(changed[numbers].any(1), first, starts[numbers])
    return replace(cells, starts=starts), changed


def _by_position(cells: Cells, numbers: "torch.Tensor", differs: "torch.Tensor") -> "torch.Tensor":
    """Whether a cell replaces a value by another one [cell, prompt, position], from all values of its layer."""
    if cells.leaf in PATTERNS:
        differs = differs.transpose(1, 2)  # [prompt, position, head, source_position]
        if cells.sources is not None:
            chosen = differs[..., cells.sources[numbers]]  # [prompt, position, head, cell]
            differs = chosen.movedim(-1, 0)
        else:
            differs = differs.any(-1).expand(len(numbers), *differs.shape[:-1])
        if cells.heads is None:
            return differs.any(-1)
        heads = cells.heads[numbers].view(-1, 1, 1, 1).expand(*differs.shape[:-1], 1)
        return differs.gather(-1, heads)[..., 0]
    if cells.heads is None:
        return differs.flatten(2).any(-1).expand(len(numbers), *differs.shape[:2])
    if differs.ndim > 3:  # heads have features, neurons are single numbers
        differs = differs.flatten(3).any(-1)
    return differs[..., cells.heads[numbers]].movedim(-1, 0)

"""A grid of any number of axes as heat maps of two."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_MOST_PANELS: Final = 24


@dataclass(frozen=True)
class Axis:
    """An axis of a grid."""

    name: str
    """``layer``, ``pos``, ``head``, ``src_pos``, ... or ``prompt``."""
    labels: tuple[str, ...]
    """What each index is called, such as ``5: ' Tower'``."""


@dataclass(frozen=True)
class Panels:
    """Heat maps side by side, with the same rows and columns."""

    title: str
    unit: str
    rows: Axis
    columns: Axis
    titles: tuple[str, ...]
    """What the heat map is of, for each; empty if there is only one."""
    values: NDArray[np.float32]
    """[panel, row, column]."""
    note: str
    """What is left out; empty if nothing is."""

    @property
    def bound(self) -> float:
        """The value with the deepest colour, in both directions."""
        finite = np.abs(self.values[np.isfinite(self.values)])
        return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def panels_of(values: "torch.Tensor", axes: Sequence[Axis], *, title: str, unit: str) -> Panels:
    """Lay a grid out.

    Prompts are averaged. Rows are layers, columns the last axis; axes between them make a heat map for each index.
    """
    numbers = values.detach().cpu().numpy().astype(np.float32)
    axes = list(axes)
    if axes[0].name == "prompt":
        title = f"{title}, mean of {len(axes[0].labels)} prompts"
        numbers, axes = numbers.mean(0), axes[1:]
    if len(axes) == 1:
        numbers, axes = numbers[:, None], [*axes, Axis("", ("all",))]
    rows, *between, columns = axes
    titles = [""]
    for axis in between:
        titles = [
            f"{head}{', ' if head else ''}{axis.name} {label}" for head in titles for label in axis.labels
        ]
    panels = numbers.reshape(len(rows.labels), -1, len(columns.labels)).transpose(1, 0, 2)
    note = ""
    if len(panels) > _MOST_PANELS:
        # The ones that say most; the table of the result has all of them.
        strongest = np.sort(np.argsort(-np.abs(panels).reshape(len(panels), -1).max(1))[:_MOST_PANELS])
        note = f"the {_MOST_PANELS} of {len(panels)} with the largest values"
        panels, titles = panels[strongest], [titles[index] for index in strongest]
    return Panels(title, unit, rows, columns, tuple(filter(None, titles)), np.ascontiguousarray(panels), note)

"""What a patching experiment gives: numbers with their axes, and what is needed to judge them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from actstore.errors import PatchError
from actstore.patching.results.page import page, table_of
from actstore.patching.results.panels import Axis, Panels, panels_of
from actstore.patching.results.picture import picture
from actstore.patching.results.table import read_table, write_table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PatchResult:
    """The metric of every cell of a grid.

    ``save("grid.parquet")`` keeps all of it, and `PatchResult.load` reads it; ``save("grid.png")`` and
    ``save("grid.html")`` make pictures. A notebook shows the picture by itself.
    """

    values: "torch.Tensor"
    """Metric of the patched run, float32 [axis, ...] in the order of ``axes``."""
    axes: tuple[Axis, ...]
    hook: str
    """The hook whose values were replaced, such as ``resid_pre``."""
    model_name: str
    corrupted: "torch.Tensor"
    """Metric of the corrupted run: one number, or one for each prompt [prompt]."""
    clean: "torch.Tensor | None"
    """Metric of the clean run; None where its logits are not known."""
    engine: str
    """``packed rows``; or ``whole rows`` and why."""
    noise_floor: float
    """Largest difference of the unpatched metric between the shapes of batches used. Smaller effects mean nothing."""
    n_skipped: int
    """Cells that change nothing, and so have exactly the metric of the corrupted run."""
    seconds: float | None
    """Time that it took; None for a mean of results."""

    @property
    def effect(self) -> "torch.Tensor":
        """How far each cell brings the metric from the corrupted run (0) to the clean one (1), shaped like ``values``.

        Raises:
            PatchError: the metric of the clean run is not known, or it is that of the corrupted run.
        """
        if self.clean is None:
            raise PatchError(
                "the metric of the clean run is not known, since the clean side was a cache without hook_resid_post of "
                "the last layer, or values were ablated; give clean prompts or a cache with it, or use `difference`"
            )
        whole = self._over_prompts(self.clean - self.corrupted)
        if not bool(whole.all()):
            raise PatchError(
                "the clean and the corrupted run have the same metric, so there is no effect to share out"
            )
        return self.difference / whole

    @property
    def difference(self) -> "torch.Tensor":
        """What each cell adds to the metric of the corrupted run, shaped like ``values``."""
        return self.values - self._over_prompts(self.corrupted)

    def top(self, n: int) -> "list[tuple[tuple[str, ...], float]]":
        """The ``n`` cells that change the metric most: (label on each axis, difference), largest first."""
        differences = self.difference.flatten()
        chosen = differences.abs().argsort(descending=True, stable=True)[:n]
        shape = tuple(len(axis.labels) for axis in self.axes)
        cells = []
        for flat in chosen.tolist():
            indices, rest = [], flat
            for size in reversed(shape):
                rest, index = divmod(rest, size)
                indices.append(index)
            labels = tuple(
                axis.labels[index] for axis, index in zip(self.axes, reversed(indices), strict=True)
            )
            cells.append((labels, float(differences[flat])))
        return cells

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result into a file, whose suffix says what: ``.parquet``, ``.png`` or ``.html``.

        Raises:
            PatchError: the suffix is another one.
            MissingExtraError: a picture needs matplotlib, which is not installed.
        """
        file = Path(path)
        if file.suffix == ".parquet":
            self.to_parquet(file)
        elif file.suffix == ".html":
            file.write_text(self.to_html(), encoding="utf-8")
        elif file.suffix == ".png":
            self.plot(file)
        else:
            raise PatchError(
                f"{file.name} ends with {file.suffix or 'no suffix'!r}; choose .parquet, .png or .html"
            )

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write one line for each cell: its index and label on every axis, ``value``, ``difference``, ``effect``."""
        columns = {"value": self.values, "difference": self.difference}
        if self._has_effect:
            columns["effect"] = self.effect
        write_table(Path(path), vars(self), {**columns, **self._own_columns})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `to_parquet` wrote.

        Raises:
            PatchError: the file is not such a table, or it is one of another kind of result.
        """
        read = read_table(Path(path))
        names = {field.name for field in fields(cls)}
        if read.keys() != names:
            kind = "Estimate" if "method" in read else "PatchResult"
            raise PatchError(f"{path} holds another kind of result; read it with patching.{kind}.load")
        return cls(**read)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw a heat map of the effects, layers upwards, and write it as PNG if there is a path.

        Returns:
            The figure of matplotlib.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return picture(self._panels(), None if path is None else Path(path))

    def to_html(self) -> str:
        """A page of its own, which loads nothing: heat maps that show the number of the cell under the mouse."""
        return page(self._panels())

    def _repr_html_(self) -> str:
        return table_of(self._panels())

    def __repr__(self) -> str:
        shape = " x ".join(f"{len(axis.labels)} {axis.name}" for axis in self.axes)
        seconds = "" if self.seconds is None else f"{self.seconds:.2f} s, "
        return (
            f"<PatchResult {self.hook} of {self.model_name}: {shape}, {self.engine}, {seconds}noise floor "
            f"{self.noise_floor:.1g}>"
        )

    @property
    def _own_columns(self) -> "Mapping[str, torch.Tensor]":
        """Columns of the table beside those of every result, each shaped like ``values``."""
        return {}

    @property
    def _has_effect(self) -> bool:
        return self.clean is not None and bool((self.clean != self.corrupted).all())

    def _panels(self) -> Panels:
        is_share = self._has_effect
        return panels_of(
            self.effect if is_share else self.difference,
            self.axes,
            title=f"{self.hook} of {self.model_name}",
            unit="share of the way to the clean run" if is_share else "change of the metric",
        )

    def _over_prompts(self, numbers: "torch.Tensor") -> "torch.Tensor":
        """Numbers of each prompt, if there are such, in a shape that goes with ``values``."""
        return numbers if numbers.ndim == 0 else numbers.view(-1, *[1] * (self.values.ndim - 1))

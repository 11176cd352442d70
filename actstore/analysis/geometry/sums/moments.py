"""Sums of rows and of products of rows, from which means, covariances and maps between hooks follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.sums.source import Source
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays
from actstore.store.statistics.array_text import upper_triangle

if TYPE_CHECKING:
    import torch

Float64 = NDArray[np.float64]
_ROWS: Final = 1024
"""Rows that are converted to float64 and multiplied at a time. It is the same for all hooks: sums depend on it, and
must not depend on which hooks share a pass.
"""
_STRIPS: Final = 4
"""Strips of a symmetric product. Only those parts of them are computed that touch its upper triangle."""
_STRIP: Final = 64
"""Columns of a strip at least."""


class ChosenOfBlock(Protocol):
    """Which rows of a block count."""

    def __call__(self, block: Block) -> NDArray[np.bool_]:
        """Whether each row does, [n_rows]."""
        ...

    def identity(self) -> str:
        """A text that differs for other choices."""
        ...


@dataclass(frozen=True)
class Products:
    """Sums over the same rows of several hooks, all in float64."""

    sources: tuple[Source, ...]
    count: int
    """Number of rows."""
    n_not_finite: int
    """Rows of other stores with NaN or infinity, which were left out."""
    sums: tuple[Float64, ...]
    """Sum of the rows of each source, [size]."""
    products: Mapping[tuple[int, int], Float64]
    """Sum of the outer products of the rows of two sources, [size, size of the second]."""
    norms: Float64 | None
    """Sum of the squared norms of the rows of each source, [n_sources]."""
    squares: Float64 | None
    """Sum of the products of the squared norms of two sources, [n_sources, n_sources]."""
    weighted: tuple[Float64, ...]
    """Sum of the rows of each source times the squared norms of every source, [n_sources, size]."""

    def mean(self, source: int) -> Float64:
        """The mean row of a source, [size]."""
        return self.sums[source] / self.count

    def squares_of(self, source: int) -> float:
        """Sum of the squared norms of the rows of a source."""
        assert self.norms is not None
        return float(self.norms[source])

    def centred(self, first: int, second: int) -> Float64:
        """The sum of the outer products of two sources after their means were taken off, [size, size]."""
        return self.products[first, second] - np.outer(self.sums[first], self.mean(second))


@dataclass(frozen=True)
class ProductSums:
    """Reduction to sums of rows and of products of rows."""

    sources: tuple[Source, ...]
    pairs: tuple[tuple[int, int], ...]
    """Sources whose products are summed; the first number is not larger than the second."""
    checked: tuple[Source, ...] = ()
    """Hooks of which a row with NaN or infinity is left out. A scan sees to those of its own store."""
    with_squares: bool = False
    rows: ChosenOfBlock | None = None
    """The rows that count; None for all."""

    @property
    def hooks(self) -> tuple[str, ...]:
        every = (*self.sources, *self.checked)
        return tuple(dict.fromkeys(source.hook for source in every if source.other is None))

    def identity(self) -> str:
        names = [source.identity for source in self.sources]
        checked = [source.identity for source in self.checked]
        rows = None if self.rows is None else self.rows.identity()
        return f"products {names} {self.pairs} {checked} {self.with_squares} {rows}"

    def start(self) -> "ProductState":
        return ProductState(self)

    def restore(self, arrays: Arrays) -> "ProductState":
        """See `Reduction.restore`."""
        state = ProductState(self)
        shapes = {"count": (2,), **self.shapes(packed=True)}
        if {name: np.shape(values) for name, values in arrays.items()} != shapes:
            raise ValueError("the state has other arrays")
        state.totals = {
            name: np.array(values, np.int64 if name == "count" else np.float64)
            for name, values in arrays.items()
        }
        return state

    def shapes(self, *, packed: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums by name; ``packed`` ones have only the upper triangle of what is symmetric."""
        sizes = [source.size for source in self.sources]
        shapes: dict[str, tuple[int, ...]] = {f"sum.{i}": (size,) for i, size in enumerate(sizes)}
        for i, j in self.pairs:
            whole = (sizes[i], sizes[j])
            shapes[_name(i, j)] = (sizes[i] * (sizes[i] + 1) // 2,) if packed and i == j else whole
        if self.with_squares:
            shapes |= {"norms": (len(sizes),), "squares": (len(sizes), len(sizes))}
            shapes |= {f"weighted.{i}": (len(sizes), size) for i, size in enumerate(sizes)}
        return shapes

    def finish(self, state: "ProductState") -> Products:
        """The sums of all rows."""
        totals = state.arrays()
        products = {}
        for first, second in self.pairs:
            product = totals[_name(first, second)]
            products[first, second] = (
                _unpacked(product, self.sources[first].size) if first == second else product
            )
        places = range(len(self.sources))
        return Products(
            sources=self.sources,
            count=int(totals["count"][0]),
            n_not_finite=int(totals["count"][1]),
            sums=tuple(totals[f"sum.{i}"] for i in places),
            products=products,
            norms=totals["norms"] if self.with_squares else None,
            squares=totals["squares"] if self.with_squares else None,
            weighted=tuple(totals[f"weighted.{i}"] for i in places) if self.with_squares else (),
        )


def _name(first: int, second: int) -> str:
    return f"product.{first}.{second}"


class ProductState:
    """The sums so far. Those of the unit that is read are whole matrices, and those that were merged are packed."""

    def __init__(self, reduction: ProductSums) -> None:
        self._of = reduction
        self.totals: dict[str, NDArray[Any]] = {}
        """What was restored or merged, as `arrays` gives it; empty if nothing was."""
        self._running: dict[str, torch.Tensor] = {}
        self._counts = np.zeros(2, np.int64)

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        reduction = self._of
        chosen = None if reduction.rows is None else reduction.rows(block)
        for source in reduction.checked:
            if source.other is None:
                continue
            is_finite = source.rows(block).isfinite().all(1).numpy()
            counted = is_finite if chosen is None else is_finite | ~chosen
            self._counts[1] += int((~counted).sum())
            chosen = is_finite if chosen is None else chosen & is_finite
        if chosen is not None and not chosen.any():
            return
        values = [source.rows(block) for source in reduction.sources]
        self._add(values, None if chosen is None or chosen.all() else np.flatnonzero(chosen))

    def _add(self, values: "list[torch.Tensor]", chosen: NDArray[np.int64] | None) -> None:
        import torch

        running = self._started()
        n_rows = len(values[0]) if chosen is None else len(chosen)
        self._counts[0] += n_rows
        for start in range(0, n_rows, _ROWS):
            part: Any = slice(start, start + _ROWS)
            if chosen is not None:
                part = torch.from_numpy(chosen[part])
            exact = [_float64(rows[part]) for rows in values]
            for i, rows in enumerate(exact):
                running[f"sum.{i}"] += rows.sum(0)
            for first, second in self._of.pairs:
                total = running[_name(first, second)]
                if first == second:
                    _add_symmetric(total, exact[first])
                else:
                    total.addmm_(exact[first].T, exact[second])
            if self._of.with_squares:
                squared = torch.stack([rows.square().sum(1) for rows in exact])
                running["norms"] += squared.sum(1)
                running["squares"] += squared @ squared.T
                for i, rows in enumerate(exact):
                    running[f"weighted.{i}"] += squared @ rows

    def _started(self) -> "dict[str, torch.Tensor]":
        import torch

        if not self._running:
            shapes = self._of.shapes(packed=False)
            self._running = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        return self._running

    def merge(self, other: Self) -> None:
        """Add the sums of rows that follow."""
        theirs = other.arrays()
        if not self.totals and not self._running:
            self.totals = {name: values.copy() for name, values in theirs.items()}
            return
        ours = self.arrays()
        self.totals = {name: np.add(values, theirs[name], out=values) for name, values in ours.items()}
        self._running, self._counts = {}, np.zeros(2, np.int64)

    def arrays(self) -> Arrays:
        """All sums; the product of a source with itself as its upper triangle, row by row."""
        if self.totals:
            return self.totals
        if not self._running:
            shapes = self._of.shapes(packed=True)
            return {"count": self._counts} | {name: np.zeros(shape) for name, shape in shapes.items()}
        arrays: dict[str, NDArray[Any]] = {"count": self._counts}
        symmetric = {_name(i, j) for i, j in self._of.pairs if i == j}
        for name, running in self._running.items():
            total = running.numpy()
            arrays[name] = total[upper_triangle(len(total))] if name in symmetric else total
        return arrays


def _float64(rows: "torch.Tensor") -> "torch.Tensor":
    import torch

    # Converting float16 directly is four times slower than through float32.
    return (rows.float() if rows.dtype == torch.float16 else rows).to(torch.float64)


def _add_symmetric(total: "torch.Tensor", rows: "torch.Tensor") -> None:
    """Add rows.T @ rows where it is on or above the diagonal, and in places below, which nothing reads."""
    size = len(total)
    strip = max(_STRIP, -(-size // _STRIPS))
    for start in range(0, size, strip):
        stop = min(start + strip, size)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def _unpacked(packed: NDArray[Any], size: int) -> Float64:
    """A symmetric matrix from its upper triangle."""
    upper = upper_triangle(size)
    whole = np.zeros((size, size))
    whole[upper] = packed
    whole.T[upper] = packed
    return whole

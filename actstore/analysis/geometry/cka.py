"""Linear CKA: how alike the geometry of hooks is, of one model or of two over the same tokens."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.showing.pictures import figure_of, plain, write
from actstore.analysis.geometry.showing.tables import table_html
from actstore.analysis.geometry.sums.moments import Products, ProductSums
from actstore.analysis.geometry.sums.passes import MAX_NBYTES, packed_within, scan_each
from actstore.analysis.geometry.sums.source import (
    Source,
    hooks_matching,
    may_have_not_finite,
    over_same_tokens,
    source_of,
)
from actstore.analysis.scanning.scan import ScanOptions
from actstore.errors import JobError

if TYPE_CHECKING:
    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

Float64 = NDArray[np.float64]
_LEAST_ROWS = 4
"""Rows that the unbiased estimate needs."""


@dataclass(frozen=True, eq=False, repr=False)
class CKA:
    """Linear centred kernel alignment of each hook of a list with each of another one."""

    values: Float64
    """[n_hooks_a, n_hooks_b]: 1 for the same geometry up to rotation, shift and scale; 0 for none in common. NaN for a
    hook whose rows do not differ.
    """
    hooks_a: tuple[str, ...]
    hooks_b: tuple[str, ...]
    count: int
    """Number of rows."""
    n_not_finite: int
    """Rows with NaN or infinity in one of the hooks, which were left out for all of them."""
    is_debiased: bool
    """Whether the estimate is free of the bias that few rows of many elements have; it can be below 0."""

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw a heat map, and write it as PNG if there is a path; returns the figure of matplotlib.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        rows, columns = self.values.shape
        figure = figure_of(min(3.5 + 0.28 * columns, 12), min(2.8 + 0.24 * rows, 12))
        axes = figure.add_subplot()
        image = axes.imshow(
            self.values, origin="lower", cmap="magma", vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set_xticks(range(columns), map(plain, self.hooks_b), rotation=90, fontsize=6)
        axes.set_yticks(range(rows), map(plain, self.hooks_a), fontsize=6)
        axes.set_title(f"linear CKA{', debiased' if self.is_debiased else ''}", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8)
        write(figure, None if path is None else Path(path))
        return figure

    def __repr__(self) -> str:
        rows, columns = self.values.shape
        kind = "debiased" if self.is_debiased else "biased"
        return f"<CKA of {rows} x {columns} hooks over {self.count:,} rows, {kind}>"

    def _repr_html_(self) -> str:
        lines = [
            [hook, *(f"{value:.3f}" for value in values)]
            for hook, values in zip(self.hooks_a, self.values, strict=True)
        ]
        return table_html(f"Linear CKA over {self.count:,} rows", ["", *self.hooks_b], lines)


def cka(
    store: "CommittedStore",
    hooks_a: "HookName | Sequence[HookName]",
    hooks_b: "HookName | Sequence[HookName] | None" = None,
    *,
    other_store: "CommittedStore | None" = None,
    debiased: bool = False,
    max_nbytes: int = MAX_NBYTES,
    **options: Unpack[ScanOptions],
) -> CKA:
    """Compare the geometry of hooks over the same tokens by linear CKA, exact over all rows, from sums in float64.

    Args:
        store: the store.
        hooks_a: a stored hook, a glob, or a list of them.
        hooks_b: those to compare with; None for the same ones.
        other_store: another store over the same tokens, such as one of a changed model, whose hooks those of b
            are. None for the same store.
        debiased: whether to estimate without bias. With few rows of many elements, even unrelated hooks seem alike
            otherwise.
        max_nbytes: the most bytes of the sums of a pass. Pairs of hooks that need more together are read one after the
            other, with the same result. Each unit that is read at the same time takes as much.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid, there are too few rows, or rows are larger than 16,384 elements.
        LoaderError: the other store has other tokens.
        ActstoreError: see `scan`.
    """
    other = over_same_tokens(store, other_store)
    of_a = [source_of(store, name) for name in hooks_matching(store, hooks_a)]
    wanted = hooks_a if hooks_b is None else hooks_b
    of_b = [source_of(store, name, other) for name in hooks_matching(other or store, wanted)]
    sources = tuple(dict.fromkeys([*of_a, *of_b]))
    places = [sources.index(one) for one in of_a], [sources.index(one) for one in of_b]
    crossed = {(min(i, j), max(i, j)) for i in places[0] for j in places[1]}
    pairs = sorted(crossed | {(i, i) for i in range(len(sources))})
    alignments, products, n_not_finite = _alignments(store, sources, pairs, debiased, max_nbytes, options)
    least = _LEAST_ROWS if debiased else 2
    if products.count < least:
        raise JobError(
            f"{products.count} rows are finite and not dropped, and CKA needs {least}; choose more of them"
        )
    values = np.empty((len(of_a), len(of_b)))
    with np.errstate(invalid="ignore", divide="ignore"):
        for row, i in enumerate(places[0]):
            for column, j in enumerate(places[1]):
                own = alignments[i, i] * alignments[j, j]
                values[row, column] = alignments[min(i, j), max(i, j)] / np.sqrt(own)
    return CKA(
        values=values,
        hooks_a=tuple(one.hook for one in of_a),
        hooks_b=tuple(one.hook for one in of_b),
        count=products.count,
        n_not_finite=n_not_finite,
        is_debiased=debiased,
    )


def _alignments(
    store: "CommittedStore",
    sources: Sequence[Source],
    pairs: Sequence[tuple[int, int]],
    debiased: bool,
    max_nbytes: int,
    options: ScanOptions,
) -> tuple[dict[tuple[int, int], float], Products, int]:
    """The alignment of each pair of sources, the sums of the last pass, and the rows that were left out."""
    # The rows of all passes must be the same: those that are finite in all sources.
    checked = tuple(source for source in sources if may_have_not_finite(source, store))
    sizes = [((i, j), 8 * sources[i].size * sources[j].size) for i, j in pairs]
    groups = packed_within(sizes, max_nbytes)
    reductions = []
    for group in groups:
        used = sorted({place for pair in group for place in pair})
        own = tuple((used.index(i), used.index(j)) for i, j in group)
        reductions.append(ProductSums(tuple(sources[i] for i in used), own, checked, debiased))
    found: dict[tuple[int, int], float] = {}
    for group, reduction, scanned in zip(
        groups, reductions, scan_each(store, reductions, **options), strict=True
    ):
        products: Products = scanned.results["sums"]
        for pair, own_pair in zip(group, reduction.pairs, strict=True):
            found[pair] = alignment(products, *own_pair, debiased=debiased)
    return found, products, sum(scanned.n_not_finite.values()) + products.n_not_finite


def alignment(products: Products, first: int, second: int, *, debiased: bool) -> float:
    """The squared norm of the centred products of two sources, which is HSIC with linear kernels but for a factor.

    Debiased it is the estimate of Song et al., Feature selection via dependence maximization (2012), in the form that
    Kornblith et al., Similarity of neural network representations revisited (2019), give it over features.
    """
    squared = float(np.square(products.centred(first, second)).sum())
    if not debiased:
        return squared
    n = products.count
    both = _centred_squares(products, first, second)
    lengths = [_sum_of_squares(products, place) for place in (first, second)]
    return squared - n / (n - 2) * both + lengths[0] * lengths[1] / ((n - 1) * (n - 2))


def _sum_of_squares(products: Products, place: int) -> float:
    """Sum of the squared norms of the rows of a source less their mean."""
    return float(products.squares_of(place) - products.count * np.square(products.mean(place)).sum())


def _centred_squares(products: Products, first: int, second: int) -> float:
    """Sum of the products of the squared norms of the rows of two sources, each less its mean.

    With a = |x|^2 and b = |y|^2 of rows x and y, means m and k, it is the sum of
    (a - 2 m x + m^2) (b - 2 k y + k^2), multiplied out.
    """
    assert products.squares is not None
    n = products.count
    m, k = products.mean(first), products.mean(second)
    mm, kk = float(m @ m), float(k @ k)
    cross = products.products[first, second]
    return float(
        products.squares[first, second]
        - 2 * k @ products.weighted[second][first]
        - 2 * m @ products.weighted[first][second]
        + 4 * m @ cross @ k
        + kk * products.squares_of(first)
        + mm * products.squares_of(second)
        - 3 * n * mm * kk
    )

"""The rows of a store that are nearest to vectors, exact."""

import hashlib
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Final, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.showing.tables import table_html
from actstore.analysis.geometry.sums.source import check_finite
from actstore.analysis.scanning.scan import ScanOptions
from actstore.analysis.top.result import TopActivations
from actstore.analysis.top.top_activations import top_activations
from actstore.errors import JobError, TokensError

if TYPE_CHECKING:
    import torch

    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

Metric = Literal["cosine", "dot", "euclidean"]
_METRICS: Final = ("cosine", "dot", "euclidean")
_SHOWN: Final = 10
"""Rows of a vector that a table shows."""


@dataclass(frozen=True, eq=False)
class Closeness:
    """Features that are larger for nearer rows: cosines less 1, products, or negative squared distances."""

    vectors: NDArray[np.float64]
    """[n_vectors, size]."""
    metric: Metric
    is_sparse: bool = False

    def __call__(self, rows: "torch.Tensor") -> "torch.Tensor":
        import torch

        exact = rows.flatten(1).double()
        vectors = torch.from_numpy(self.vectors)
        products = exact @ vectors.T
        if self.metric == "dot":
            return products.float()
        if self.metric == "cosine":
            # A row of zeros has no angle: 0 / 0 is NaN, which is counted and not ranked. Less 1, since float32 tells
            # small numbers apart better than those near 1.
            lengths = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
            cosines: torch.Tensor = products / lengths / torch.linalg.vector_norm(vectors, dim=1)
            return (cosines - 1).float()
        squared = exact.square().sum(1, keepdim=True) + vectors.square().sum(1)
        return (2 * products - squared).clamp(max=0).float()

    def identity(self) -> str:
        digest = hashlib.sha256(self.vectors.tobytes()).hexdigest()
        return f"{self.metric} {self.vectors.shape} {digest}"


@dataclass(frozen=True, repr=False)
class Nearest(TopActivations):
    """The rows nearest to each vector, nearest first. ``values`` are cosines or products, largest first, or distances,
    smallest first.
    """

    metric: Metric = field(kw_only=True)

    def __repr__(self) -> str:
        n, k = self.values.shape
        return f"<Nearest {self.hook}: {k} of {self.n_rows:,} rows for each of {n} vectors by {self.metric}>"

    def _repr_html_(self) -> str:
        lines = []
        for vector, values in enumerate(self.values):
            for i, value in enumerate(values[:_SHOWN].tolist()):
                if self.sequences[vector, i] >= 0:
                    where = f"{self.sequences[vector, i]}:{self.positions[vector, i]}"
                    lines.append([f"{vector}", f"{value:.4g}", where, self._text(vector, i)])
        return table_html(
            f"Rows of {self.hook} nearest by {self.metric}", ["vector", "", "row", "text"], lines
        )

    def _text(self, vector: int, i: int) -> str:
        try:
            return str(self.context(vector, i, before=8, after=4))
        except TokensError:
            return ""


def nearest(
    store: "CommittedStore",
    hook: "HookName",
    vectors: Any,
    k: int = 20,
    *,
    metric: Metric = "cosine",
    **options: Unpack[ScanOptions],
) -> Nearest:
    """Find the rows that are nearest to vectors: exact, in one pass over the store.

    Figures are computed in float64 and ranked as float32; of equal ones, the first row in the store comes first.

    Args:
        store: the store.
        hook: a stored hook.
        vectors: one vector [*shape], or several [n_vectors, *shape], where shape is that of the hook.
        k: rows of each vector.
        metric: ``cosine``, ``dot``, or ``euclidean``.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid, or a vector has no direction.
        ActstoreError: see `scan`.
    """
    if metric not in _METRICS:
        raise JobError(f"metric is {metric!r}; it can be {', '.join(_METRICS)}")
    array = store.array_of(hook)
    check_finite(array.name)
    closeness = Closeness(_vectors(vectors, tuple(array.shape)), metric)
    if metric == "cosine" and not np.linalg.norm(closeness.vectors, axis=1).all():
        raise JobError("a vector is 0, and has no direction to compare by cosine; choose metric='euclidean'")
    top = top_activations(store, hook, closeness, k, **options)
    fields = dict(vars(top))
    if metric == "euclidean":
        fields["values"] = np.sqrt(np.abs(top.values))
    elif metric == "cosine":
        fields["values"] = 1 + top.values
    return Nearest(**fields, metric=metric)


def _vectors(vectors: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Vectors as [n_vectors, size]."""
    given = vectors.detach().double().cpu() if hasattr(vectors, "detach") else vectors
    values = np.asarray(given, np.float64)
    of_one = values.shape[values.ndim - len(shape) :] if values.ndim >= len(shape) else ()
    if values.ndim not in (len(shape), len(shape) + 1) or of_one != shape or not values.size:
        raise JobError(
            f"vectors have shape {list(values.shape)}; give one of {list(shape)}, or several of them as "
            f"[n, {', '.join(map(str, shape))}]"
        )
    if not np.isfinite(values).all():
        raise JobError("vectors hold NaN or infinity, to which no row is near; give finite ones")
    return np.ascontiguousarray(values.reshape(-1, prod(shape)))
